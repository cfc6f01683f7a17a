//! Sums and maxima of rows, means of columns.

use foveate::{
    Result,
    cuda::{
        Element, Strided,
        reduce::{Reduction, reduce},
    },
};

use super::{ALL_TYPES, Launch, Operation, Place, Shape, Value, Work, by_type};

pub(super) const OPERATIONS: &[Operation] = &[
    Operation::new("column_mean", ALL_TYPES, |place, dtype, shape| {
        by_type!(dtype, column_mean(place, shape))
    }),
    Operation::new("row_max", ALL_TYPES, |place, dtype, shape| by_type!(dtype, row_max(place, shape))),
    Operation::new("row_sum", ALL_TYPES, |place, dtype, shape| by_type!(dtype, row_sum(place, shape))),
];

fn column_mean<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, Reduction::ColumnMean, shape.batch * shape.width)
}

fn row_max<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, Reduction::RowMax, shape.batch * shape.tokens)
}

fn row_sum<T: Value>(place: &Place, shape: Shape) -> Result<Launch> {
    prepare::<T>(place, shape, Reduction::RowSum, shape.batch * shape.tokens)
}

fn prepare<T: Value>(place: &Place, shape: Shape, reduction: Reduction, results: usize) -> Result<Launch> {
    let Place { device, stream } = place.clone();
    let extents = [shape.batch, shape.tokens, shape.width];
    let count: usize = extents.iter().product();
    let x = place.values::<T>(count, 1)?;
    let mut out = place.zeros::<f32>(results)?;
    let bytes = count * <T as Element>::DTYPE.bytes() + 4 * results;
    Ok(Launch::new(Work { bytes, ..Work::default() }, move || {
        let x = Strided::new(x.as_view(), extents);
        reduce(&device, &stream, reduction, &x, &mut out.as_view_mut())
    }))
}
