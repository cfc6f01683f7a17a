//! The embedded kernels and the table of their names.

use std::sync::Arc;

use cudarc::{
    driver::{CudaContext, CudaFunction, CudaModule, DriverError, sys},
    nvrtc::Ptx,
};

use super::{
    DType, activation::ActivationKernels, attention::AttentionKernels, cluster::ClusterKernels,
    connectivity::ConnectivityKernels, convert::ConvertKernels, convolution::ConvolutionKernels,
    frequency::FrequencyKernels, grid_norm::GridNormKernels, head_norm::HeadNormKernels, patch::PatchKernels,
    performer::PerformerKernels, predictor::PredictorKernels, reduce::ReduceKernels, score::ScoreKernels,
    softmax::SoftmaxKernels, structured::StructuredKernels, tokens::TokenKernels, unfold::UnfoldKernels,
    windows::WindowKernels,
};
use crate::{Error, Result};

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The lowest compute capability the kernels are written for.
const OLDEST: (i32, i32) = (8, 0);

/// A kernel of a loaded module.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) name: String,
    pub(super) function: CudaFunction,
}

/// An instantiation of a kernel over rows: a team of warps that holds a row, 8 values a lane (kernels/include/row.cuh).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RowShape {
    suffix: &'static str,
    warps: usize,
    wide: bool,
}

impl RowShape {
    /// Values of the widest row.
    fn widest(self) -> usize {
        self.warps * 32 * 8
    }

    /// Rows a block works on.
    pub(super) fn rows(self) -> u32 {
        if self.warps == 1 { 4 } else { 1 }
    }

    /// Threads of a block.
    pub(super) fn threads(self) -> u32 {
        self.warps as u32 * self.rows() * 32
    }
}

const fn shape(suffix: &'static str, warps: usize, wide: bool) -> RowShape {
    RowShape { suffix, warps, wide }
}

/// The instantiations, in ascending order of width.
const ROW_SHAPES: [RowShape; 8] = [
    shape("256", 1, true),
    shape("512", 2, true),
    shape("768", 3, true),
    shape("1024", 4, true),
    shape("2048", 8, true),
    shape("4096", 16, true),
    shape("1024_narrow", 4, false),
    shape("4096_narrow", 16, false),
];

/// The widest row.
pub(super) const WIDEST: usize = 4096;

/// What rows hold, and what their LayerNorm does, with its weight and bias: the same type, or 16 bits beside `f32` (a residual
/// stream in single precision).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowTypes {
    /// Of the rows, read and written.
    pub rows: DType,
    /// Of the LayerNorm's weight, bias and result.
    pub normed: DType,
}

impl From<DType> for RowTypes {
    fn from(dtype: DType) -> Self {
        Self { rows: dtype, normed: dtype }
    }
}

impl RowTypes {
    /// All that there are kernels for; those of one type first, in the order of [`DType::ALL`].
    const ALL: [Self; 5] = [
        Self { rows: DType::F32, normed: DType::F32 },
        Self { rows: DType::F16, normed: DType::F16 },
        Self { rows: DType::Bf16, normed: DType::Bf16 },
        Self { rows: DType::F32, normed: DType::F16 },
        Self { rows: DType::F32, normed: DType::Bf16 },
    ];

    fn name(self) -> String {
        let Self { rows, normed } = self;
        if rows == normed { rows.to_string() } else { format!("{rows}_{normed}") }
    }
}

/// A kernel over rows, for every type and shape.
#[derive(Debug)]
pub(super) struct RowKernels(Vec<Kernel>);

impl RowKernels {
    /// Those of one type.
    pub(super) fn load(module: &Module, prefix: &str) -> Result<Self> {
        Self::load_types(module, prefix, &RowTypes::ALL[..DType::ALL.len()])
    }

    /// All.
    pub(super) fn load_mixed(module: &Module, prefix: &str) -> Result<Self> {
        Self::load_types(module, prefix, &RowTypes::ALL)
    }

    fn load_types(module: &Module, prefix: &str, types: &[RowTypes]) -> Result<Self> {
        let name = |types: RowTypes, shape: RowShape| format!("{prefix}_{}_{}", types.name(), shape.suffix);
        let names = types.iter().flat_map(|&types| ROW_SHAPES.map(|shape| name(types, shape)));
        Ok(Self(names.map(|name| module.kernel(name)).collect::<Result<_>>()?))
    }

    /// The kernel for rows of `width` values, with 16-byte accesses or narrow ones.
    pub(super) fn pick(
        &self,
        op: &'static str,
        types: impl Into<RowTypes>,
        width: usize,
        wide: bool,
    ) -> Result<(&Kernel, RowShape)> {
        let at = row_shape(width, wide).ok_or_else(|| {
            Error::argument(op, format!("rows have {width} values, the kernels hold up to {WIDEST}"))
        })?;
        let types @ RowTypes { rows, normed } = types.into();
        let place = RowTypes::ALL.iter().position(|&other| other == types);
        let kernel = place.and_then(|place| self.0.get(place * ROW_SHAPES.len() + at)).ok_or_else(|| {
            Error::argument(
                op,
                format!(
                    "no kernel normalises rows of {rows} to {normed}: both are one type, or the rows are f32"
                ),
            )
        })?;
        Ok((kernel, ROW_SHAPES[at]))
    }
}

/// The first shape that holds `width` values.
fn row_shape(width: usize, wide: bool) -> Option<usize> {
    ROW_SHAPES.iter().position(|shape| shape.wide == wide && width <= shape.widest())
}

/// A kernel for every type, in the order of [`DType::ALL`].
#[derive(Debug)]
pub(super) struct TypedKernels([Kernel; 3]);

impl TypedKernels {
    fn load(module: &Module, prefix: &str) -> Result<Self> {
        Self::load_variant(module, prefix, "")
    }

    /// The kernels `prefix_type` followed by `suffix`.
    pub(super) fn load_variant(module: &Module, prefix: &str, suffix: &str) -> Result<Self> {
        let [f32, f16, bf16] = DType::ALL.map(|dtype| module.kernel(format!("{prefix}_{dtype}{suffix}")));
        Ok(Self([f32?, f16?, bf16?]))
    }

    /// The kernels with 16-byte accesses and those with narrow ones, in this order.
    pub(super) fn wide_and_narrow(module: &Module, prefix: &str, suffix: &str) -> Result<[Self; 2]> {
        let narrow = format!("{suffix}_narrow");
        Ok([Self::load_variant(module, prefix, suffix)?, Self::load_variant(module, prefix, &narrow)?])
    }

    pub(super) fn pick(&self, dtype: DType) -> &Kernel {
        match dtype {
            DType::F32 => &self.0[0],
            DType::F16 => &self.0[1],
            DType::Bf16 => &self.0[2],
        }
    }

    pub(super) fn all(&self) -> &[Kernel] {
        &self.0
    }
}

/// Kernels that copy, by the bytes of their accesses.
#[derive(Debug)]
pub(super) struct CopyKernels([Kernel; 3]);

impl CopyKernels {
    pub(super) fn load(module: &Module, prefix: &str) -> Result<Self> {
        let [wide, word, half] = ["16", "4", "2"].map(|bytes| module.kernel(format!("{prefix}_{bytes}")));
        Ok(Self([wide?, word?, half?]))
    }

    pub(super) fn pick(&self, bytes: usize) -> &Kernel {
        match bytes {
            16 => &self.0[0],
            4 => &self.0[1],
            _ => &self.0[2],
        }
    }
}

/// The kernels of matching.
#[derive(Debug)]
pub(super) struct MatchingKernels {
    /// By the widest row that each holds, ascending.
    pub(super) resident: [TypedKernels; 2],
    pub(super) tiles: TypedKernels,
    pub(super) criteria: TypedKernels,
}

/// All kernels of a device, loaded when the device is opened: no operation loads anything, so all can be captured.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) attention: AttentionKernels,
    pub(super) layer_norm: RowKernels,
    pub(super) matching: MatchingKernels,
    pub(super) merge: RowKernels,
    pub(super) unmerge: CopyKernels,
    pub(super) activation: ActivationKernels,
    pub(super) cluster: ClusterKernels,
    pub(super) windows: WindowKernels,
    pub(super) connectivity: ConnectivityKernels,
    pub(super) convolution: ConvolutionKernels,
    pub(super) frequency: FrequencyKernels,
    pub(super) grid_norm: GridNormKernels,
    pub(super) head_norm: HeadNormKernels,
    pub(super) patch: PatchKernels,
    pub(super) performer: PerformerKernels,
    pub(super) predictor: PredictorKernels,
    pub(super) reduce: ReduceKernels,
    pub(super) score: ScoreKernels,
    pub(super) softmax: SoftmaxKernels,
    pub(super) structured: StructuredKernels,
    pub(super) tokens: TokenKernels,
    pub(super) unfold: UnfoldKernels,
    pub(super) compose: Kernel,
    pub(super) convert: ConvertKernels,
    pub(super) select_rank: TypedKernels,
    pub(super) select_sort: TypedKernels,
}

impl Kernels {
    pub(super) fn load(context: &Arc<CudaContext>, device: &str, capability: (i32, i32)) -> Result<Self> {
        let fail = |what: String| Error::Kernels { device: device.to_owned(), what };
        if IMAGES.is_empty() {
            return Err(fail(
                "this binary was built without kernels (DOCS_RS or FOVEATE_NO_KERNELS was set): build it again without"
                    .to_owned(),
            ));
        }
        if capability < OLDEST {
            return Err(fail(format!(
                "the kernels need compute capability {}.{} or higher; use the CPU backend",
                OLDEST.0, OLDEST.1
            )));
        }
        let module = |file: &'static str| Module::load(context, device, file);
        let (norm, merge, plan, select) =
            (module("norm")?, module("merge")?, module("plan")?, module("select")?);
        let matching = module("matching")?;
        Ok(Self {
            attention: AttentionKernels::load(module)?,
            layer_norm: RowKernels::load_mixed(&norm, "fv_layer_norm")?,
            matching: MatchingKernels {
                resident: [
                    TypedKernels::load(&matching, "fv_match_resident_64")?,
                    TypedKernels::load(&matching, "fv_match_resident_96")?,
                ],
                tiles: TypedKernels::load(&matching, "fv_match_tiles")?,
                criteria: TypedKernels::load(&matching, "fv_match_criteria")?,
            },
            merge: RowKernels::load_mixed(&merge, "fv_merge")?,
            unmerge: CopyKernels::load(&merge, "fv_unmerge")?,
            activation: ActivationKernels::load(&module("activation")?)?,
            cluster: ClusterKernels::load(&module("cluster")?)?,
            windows: WindowKernels::load(&module("windows")?)?,
            connectivity: ConnectivityKernels::load(&module("connectivity")?)?,
            convolution: ConvolutionKernels::load(&module("convolution")?)?,
            frequency: FrequencyKernels::load(&module("frequency")?, &module("frequency_mma")?)?,
            grid_norm: GridNormKernels::load(&module("grid_norm")?)?,
            head_norm: HeadNormKernels::load(&module("head_norm")?)?,
            patch: PatchKernels::load(&module("patch")?)?,
            performer: PerformerKernels::load(&module("performer")?)?,
            predictor: PredictorKernels::load(&module("predictor")?)?,
            reduce: ReduceKernels::load(&module("reduce")?)?,
            score: ScoreKernels::load(&module("score")?)?,
            softmax: SoftmaxKernels::load(&module("softmax")?)?,
            structured: StructuredKernels::load(&module("structured")?)?,
            tokens: TokenKernels::load(&module("tokens")?)?,
            unfold: UnfoldKernels::load(&module("unfold")?)?,
            convert: ConvertKernels::load(&module("convert")?)?,
            compose: plan.kernel("fv_plan_compose".to_owned())?,
            select_rank: TypedKernels::load(&select, "fv_select_rank")?,
            select_sort: TypedKernels::load(&select, "fv_select_sort")?,
        })
    }
}

/// The image of one file of kernels/ on a device. The driver takes the machine code for the device out of it, else
/// compiles its PTX.
pub(super) struct Module {
    device: String,
    file: &'static str,
    loaded: Arc<CudaModule>,
}

/// The CUDA version that the driver is for.
fn driver_version() -> Result<(u32, u32), DriverError> {
    let mut version = 0;
    // SAFETY: the pointer is valid for a write; the driver is there, for it has refused a module.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    let version = u32::try_from(version).unwrap_or(0);
    Ok((version / 1000, version % 1000 / 10))
}

impl Module {
    fn load(context: &Arc<CudaContext>, device: &str, file: &'static str) -> Result<Self> {
        let fail = |what: String| Error::Kernels { device: device.to_owned(), what };
        let image = IMAGES.iter().find(|(name, _)| *name == file).map(|(_, image)| *image);
        let image = image.ok_or_else(|| fail(format!("this binary holds no kernels/{file}.cu")))?;
        let loaded = context.load_module(Ptx::from_binary(image.to_vec())).map_err(|error| {
            let remedy = match (driver_version(), NVCC) {
                (Ok(driver), nvcc) if driver < nvcc => format!(
                    "update the driver, which is for CUDA {}.{}, to one for {}.{} or newer, or build with an nvcc of its \
                     release",
                    driver.0, driver.1, nvcc.0, nvcc.1
                ),
                _ => "build with FOVEATE_CUDA_ARCHS naming this device".to_owned(),
            };
            fail(format!(
                "the driver does not load kernels/{file}.cu, which holds machine code for {ARCHITECTURES:?} and PTX for \
                 compute_80: {error:?}; {remedy}"
            ))
        })?;
        Ok(Self { device: device.to_owned(), file, loaded })
    }

    pub(super) fn kernel(&self, name: String) -> Result<Kernel> {
        let function = self.loaded.load_function(&name).map_err(|error| Error::Kernels {
            device: self.device.clone(),
            what: format!("kernels/{}.cu has no {name}: {error:?}", self.file),
        })?;
        Ok(Kernel { name, function })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_has_the_narrowest_shape_that_holds_it() {
        for wide in [true, false] {
            for width in 1..=WIDEST {
                let shape = ROW_SHAPES[row_shape(width, wide).unwrap()];
                assert!(shape.wide == wide && shape.widest() >= width);
                let narrower = |other: &RowShape| other.wide == wide && other.widest() < shape.widest();
                assert!(
                    ROW_SHAPES.iter().filter(|other| narrower(other)).all(|other| other.widest() < width)
                );
            }
            assert_eq!(row_shape(WIDEST + 1, wide), None);
        }
    }
}
