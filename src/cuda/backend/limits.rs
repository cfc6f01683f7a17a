//! Which models the kernels take.

use super::{
    super::{
        DType,
        attention::{check_head_dim, widened},
        image::WIDEST,
    },
    Cuda,
};
use crate::{Error, Result, model::VitConfig};

impl Cuda {
    /// Whether there are kernels for a model's heads and width in this type: known before any weight is on a device. Heads that
    /// are a little narrower are filled up with zeros, where no norm takes means over them. What else an operation asks for is
    /// said when it runs.
    ///
    /// # Errors
    /// [`Error::Argument`], which names the number and what there are kernels for.
    pub fn supports(config: &VitConfig, dtype: DType) -> Result<()> {
        check_head_dim(dtype, widened(dtype, config.head_dim()))?;
        if config.width <= WIDEST {
            return Ok(());
        }
        Err(Error::argument(
            "layer_norm",
            format!("tokens have {} values, the kernels hold up to {WIDEST}", config.width),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::arch;

    #[test]
    fn models_are_refused_before_they_are_uploaded() {
        let of = |width, heads| VitConfig { width, heads, ..arch::config("deit_tiny").unwrap() };
        for dtype in DType::ALL {
            for name in arch::names() {
                Cuda::supports(&arch::config(name).unwrap(), dtype).unwrap();
            }
            let error = Cuda::supports(&of(8192, 64), dtype).unwrap_err().to_string();
            assert!(error.contains("8192 values") && error.contains("4096"), "{error}");
        }
        let narrow = of(64, 4);
        Cuda::supports(&narrow, DType::F32).unwrap();
        let error = Cuda::supports(&narrow, DType::F16).unwrap_err().to_string();
        assert!(error.contains("heads have 16 values") && error.contains("in f32"), "{error}");
        assert!(Cuda::supports(&of(12, 3), DType::F32).is_err());
        // 20 values: filled up to 24 in f32, too few for 32.
        Cuda::supports(&of(60, 3), DType::F32).unwrap();
        assert!(Cuda::supports(&of(60, 3), DType::F16).is_err());
    }
}
