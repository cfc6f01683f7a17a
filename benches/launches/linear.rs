//! The first layer of a block's MLP, four times as wide as its input, with GELU.

use foveate::{
    Result,
    backend::Linear,
    cuda::{
        Blas, Element, Strided,
        linear::{Affine, Fused, linear},
    },
};

use super::{ALL_TYPES, Counted, Launch, Operation, Place, Shape, Units, Value, Work, by_type};

pub(super) const OPERATIONS: &[Operation] = &[
    // The kernels are cuBLASLt's.
    Operation::new("linear", ALL_TYPES, |place, dtype, shape| by_type!(dtype, prepare(place, shape)))
        .counted(Counted::Nowhere),
];

fn prepare<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let Shape { batch, tokens, width, .. } = shape;
    let (rows, outputs) = (batch * tokens, 4 * width);
    let blas = Blas::new(&device)?;
    let (x, weight) = (place.values::<T>(rows * width, 1)?, place.values::<T>(outputs * width, 2)?);
    let bias = place.values::<T>(outputs, 3)?;
    let mut out = place.zeros::<T>(rows * outputs)?;
    let mut workspace = place.zeros::<u8>(blas.workspace_bytes())?;
    let elements = rows * (width + outputs) + outputs * (width + 1);
    let work = Work {
        bytes: elements * <T as Element>::DTYPE.bytes(),
        flops: 2 * rows * width * outputs,
        units: Units::of(<T as Element>::DTYPE),
    };
    Ok(Launch::new(work, move || {
        let affine = Affine {
            x: Strided::new(x.as_view(), [batch, tokens, width]),
            layer: Linear { weight: weight.as_view(), bias: Some(bias.as_view()) },
            outputs: None,
            fused: Fused::GeluTanh,
        };
        let mut out = Strided::new(out.as_view_mut(), [batch, tokens, outputs]);
        linear(&blas, &stream, &affine, &mut out, &mut workspace.as_view_mut())
    }))
}
