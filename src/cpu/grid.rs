//! The operations of [`GridBackend`].

use super::{
    Cpu, Tensor,
    activation::Activate,
    check::{addressable, expect_shape, tokens_shape},
    frequency::{self, MOST_SIDE},
    gemm::Finish,
    pack::{Form, Packed, Shared},
    schedule::product_of,
    simd::{Kernel, Simd, math},
    stem::Places,
    timing::Kind,
};
use crate::{
    Error, Result,
    backend::{Convolution, Depthwise, Frequency, GridBackend, Norm, NormOver, Window},
    model::Activation,
};

/// Values of one task.
const TASK: usize = 1 << 14;

/// A feature map (batch, channels) and the places of a 3x3 window over it.
fn feature_map(
    op: &'static str,
    x: &Tensor,
    grid: [usize; 2],
    stride: usize,
    activations: [Option<Activation>; 2],
) -> Result<([usize; 2], Places)> {
    let &[batch, positions, channels] = x.shape() else {
        return Err(Error::argument(
            op,
            format!("x has shape {:?}, expected (images, positions, channels)", x.shape()),
        ));
    };
    if positions == 0 || batch == 0 || channels == 0 || Some(positions) != grid[0].checked_mul(grid[1]) {
        return Err(Error::argument(
            op,
            format!("x has shape {:?}, which is no feature map of {}x{}", x.shape(), grid[0], grid[1]),
        ));
    }
    if !matches!(stride, 1 | 2) {
        return Err(Error::argument(op, format!("stride {stride}; 1 and 2 are supported")));
    }
    if activations.contains(&Some(Activation::SwiGlu)) {
        return Err(Error::argument(op, "swiglu halves the channels; a convolution keeps them"));
    }
    Ok(([batch, channels], Places::new(op, Window { kernel: 3, stride, padding: 1 }, grid)?))
}

impl Cpu {
    fn activated(&self, x: Tensor, activation: Activation) -> Tensor {
        let (shape, context) = (x.shape, &*self.context);
        let mut out = x.into_buffer(&context.pool);
        let len = out.len();
        let shared = Shared::of(out.make_mut());
        context.threads.run(len.div_ceil(TASK), |_, task| {
            // SAFETY: each task has values of its own.
            let values = unsafe { shared.part(task * TASK, TASK.min(len - task * TASK)) };
            context.kernels.run(Activate { activation, values });
        });
        Tensor::pooled(shape, out)
    }

    fn convolved(&self, x: &Tensor, grid: [usize; 2], layer: &Convolution<Tensor>) -> Result<Tensor> {
        const OP: &str = "convolution";
        let ([batch, inputs], places) = feature_map(OP, x, grid, layer.stride, [layer.activation, None])?;
        let outputs = layer.weight.width();
        expect_shape(OP, "weight", &layer.weight, &[9 * inputs, outputs])?;
        expect_shape(OP, "bias", &layer.bias, &[outputs])?;
        if outputs == 0 {
            return Err(Error::argument(OP, "the layer has no outputs"));
        }
        let (context, count) = (&*self.context, places.count());
        let shape = [batch, count, outputs];
        let mut out = context.pool.take(addressable(OP, shape)?);
        let (x, bias) = (x.view(), layer.bias.view());
        let per_image = x.len() / batch;
        let look = |row: usize, out: &mut [f32]| {
            places.look(&x[row / count * per_image..][..per_image], row % count, out);
        };
        let mut passing = None;
        let packed =
            layer.weight.packed(Form::Columns, &mut passing, |weight| Packed::of_columns(weight, outputs));
        let finish = Finish { bias: Some(&bias), activation: layer.activation, ..Finish::default() };
        product_of(context, batch * count, look, packed.right(), out.make_mut(), finish);
        Ok(Tensor::pooled(shape, out))
    }

    fn convolved_depthwise(&self, x: &Tensor, grid: [usize; 2], layer: &Depthwise<Tensor>) -> Result<Tensor> {
        const OP: &str = "depthwise";
        let activations = [layer.before, layer.activation];
        let ([batch, channels], places) = feature_map(OP, x, grid, layer.stride, activations)?;
        expect_shape(OP, "weight", &layer.weight, &[9, channels])?;
        expect_shape(OP, "bias", &layer.bias, &[channels])?;
        let (context, count, columns) = (&*self.context, places.count(), places.over[1]);
        let activated = layer.before.map(|activation| self.activated(x.clone(), activation));
        let x = activated.as_ref().unwrap_or(x).view();
        let (weight, bias) = (layer.weight.view(), layer.bias.view());
        let per_image = x.len() / batch;
        let shape = [batch, count, channels];
        let mut out = context.pool.take(addressable(OP, shape)?);
        let shared = Shared::of(out.make_mut());
        context.threads.run(batch * places.over[0], |_, task| {
            let (image, row) = (task / places.over[0], task % places.over[0]);
            let image = &x[image * per_image..][..per_image];
            // SAFETY: each task has a row of places of its own.
            let out = unsafe { shared.part(task * columns * channels, columns * channels) };
            let lines = [0, 1, 2].map(|tap| {
                let first = places.seen(0, row, tap)? * grid[1] * channels;
                Some(&image[first..first + grid[1] * channels])
            });
            let (weight, bias, stride) = (&*weight, &*bias, layer.stride);
            let (width, activation) = (grid[1], layer.activation);
            context.kernels.run(DepthwiseRow {
                lines,
                width,
                channels,
                weight,
                bias,
                stride,
                activation,
                out,
            });
        });
        Ok(Tensor::pooled(shape, out))
    }

    fn normed(&self, x: &Tensor, over: NormOver, norm: &Norm<Tensor>) -> Result<Tensor> {
        const OP: &str = "grid_norm";
        let [batch, positions, channels] = tokens_shape(OP, "x", x)?;
        expect_shape(OP, "weight", &norm.weight, &[channels])?;
        norm.bias.as_ref().map_or(Ok(()), |bias| expect_shape(OP, "bias", bias, &[channels]))?;
        let context = &*self.context;
        let (shape, eps) = (x.shape, f64::from(norm.eps));
        let (x, weight, bias) = (x.view(), norm.weight.view(), norm.bias.as_ref().map(Tensor::view));
        let mut out = context.pool.take(x.len());
        let shared = Shared::of(out.make_mut());
        // Positions whose statistics are taken together.
        let span = if over == NormOver::Image { positions } else { 1 };
        let per_task = if over == NormOver::Image { span } else { TASK.div_ceil(channels) };
        let rows = batch * positions;
        context.threads.run(rows.div_ceil(per_task), |_, task| {
            let (first, last) = (task * per_task, rows.min((task + 1) * per_task));
            for first in (first..last).step_by(span) {
                let x = &x[first * channels..(first + span) * channels];
                // SAFETY: each task has rows of its own.
                let out = unsafe { shared.part(first * channels, span * channels) };
                let [mean, variance] =
                    if over == NormOver::Nothing { [0.0, 0.0] } else { context.kernels.run(Moments(x)) };
                let scale = match over {
                    NormOver::Nothing => 1.0,
                    NormOver::Image => 1.0 / (variance + eps).sqrt(),
                    NormOver::Position => 1.0 / (variance.sqrt() + eps),
                };
                for (out, x) in out.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                    let (weight, bias) = (&*weight, bias.as_deref());
                    let (mean, scale) = (mean as f32, scale as f32);
                    context.kernels.run(Scale { x, mean, factor: scale, weight, bias, out });
                }
            }
        });
        Ok(Tensor::pooled(shape, out))
    }
}

/// Columns of a row whose channels are summed vector by vector while what they see is in the first-level cache.
const COLUMNS: usize = 16;

/// A row of a 3x3 depthwise convolution.
struct DepthwiseRow<'a> {
    /// The input's rows (width, channels) that are seen; none beyond the border.
    lines: [Option<&'a [f32]>; 3],
    width: usize,
    channels: usize,
    /// (9, channels).
    weight: &'a [f32],
    bias: &'a [f32],
    stride: usize,
    activation: Option<Activation>,
    /// (columns, channels).
    out: &'a mut [f32],
}

impl Kernel for DepthwiseRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { lines, width, channels, weight, bias, stride, activation, out } = self;
        let columns = out.len() / channels;
        assert!(lines.iter().flatten().all(|line| line.len() == width * channels));
        assert!(weight.len() == 9 * channels && bias.len() == channels && (columns - 1) * stride < width);
        let vectors = channels / S::LANES * S::LANES;
        for first in (0..columns).step_by(COLUMNS) {
            let last = columns.min(first + COLUMNS);
            for at in (0..vectors).step_by(S::LANES) {
                let mut weights = [s.splat(0.0); 9];
                for (tap, to) in weights.iter_mut().enumerate() {
                    *to = s.load(&weight[tap * channels + at..]);
                }
                let bias = s.load(&bias[at..]);
                for column in first..last {
                    // The middle tap sees `column·stride`, which is below the width.
                    let middle = column * stride;
                    let (left, right) = (middle > 0, middle + 1 < width);
                    let mut sum = bias;
                    for (weights, line) in weights.as_chunks::<3>().0.iter().zip(lines) {
                        let Some(line) = line else { continue };
                        // SAFETY: positions from 0 to `width - 1` and a whole vector of channels from `at` on lie in the line,
                        // whose length was checked.
                        unsafe {
                            let line = line.as_ptr().add(middle * channels + at);
                            if left {
                                sum = s.fma(weights[0], s.read(line.sub(channels)), sum);
                            }
                            sum = s.fma(weights[1], s.read(line), sum);
                            if right {
                                sum = s.fma(weights[2], s.read(line.add(channels)), sum);
                            }
                        }
                    }
                    let sum = activation.map_or(sum, |activation| math::activate(s, activation, sum));
                    s.store(&mut out[column * channels + at..], sum);
                }
            }
            if vectors == channels {
                continue;
            }
            for column in first..last {
                let rest = vectors..channels;
                let mut sum = s.load_some(&bias[rest.clone()], 0.0);
                for (tap, line) in (0..9).filter_map(|tap| Some((tap, lines[tap / 3]?))) {
                    let Some(x) = (column * stride + tap % 3).checked_sub(1).filter(|&x| x < width) else {
                        continue;
                    };
                    let weight = s.load_some(&weight[tap * channels..][rest.clone()], 0.0);
                    sum = s.fma(weight, s.load_some(&line[x * channels..][rest.clone()], 0.0), sum);
                }
                let sum = activation.map_or(sum, |activation| math::activate(s, activation, sum));
                s.store_some(&mut out[column * channels..][rest], sum);
            }
        }
    }
}

/// Mean and variance (over n) of many values: sums of 1,024 at a time in vectors, the rest in double precision.
struct Moments<'a>(&'a [f32]);

impl Kernel for Moments<'_> {
    type Output = [f64; 2];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [f64; 2] {
        let count = self.0.len() as f64;
        let mut total = 0.0;
        for part in self.0.chunks(1024) {
            let mut sum = s.splat(0.0);
            let chunks = part.chunks_exact(S::LANES);
            let tail = s.load_some(chunks.remainder(), 0.0);
            chunks.for_each(|x| sum = s.add(sum, s.load(x)));
            total += f64::from(s.sum(s.add(sum, tail)));
        }
        let mean = total / count;
        let centre = s.splat(mean as f32);
        let mut total = 0.0;
        for part in self.0.chunks(1024) {
            let mut sum = s.splat(0.0);
            let chunks = part.chunks_exact(S::LANES);
            let tail = s.sub(s.load_some(chunks.remainder(), mean as f32), centre);
            chunks.for_each(|x| {
                let x = s.sub(s.load(x), centre);
                sum = s.fma(x, x, sum);
            });
            total += f64::from(s.sum(s.fma(tail, tail, sum)));
        }
        // The mean was rounded once; its error counts as often as there are values.
        let off = mean - f64::from(mean as f32);
        [mean, (total / count - off * off).max(0.0)]
    }
}

/// `out = (x - mean)·factor·weight + bias`.
struct Scale<'a> {
    x: &'a [f32],
    mean: f32,
    factor: f32,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let channels = self.out.len();
        let (mean, scale) = (s.splat(self.mean), s.splat(self.factor));
        for at in (0..channels).step_by(S::LANES) {
            let range = at..channels.min(at + S::LANES);
            let whole = range.len() == S::LANES;
            let load = |x: &[f32]| {
                let x = &x[range.clone()];
                if whole { s.load(x) } else { s.load_some(x, 0.0) }
            };
            let y = s.mul(s.sub(load(self.x), mean), scale);
            let y = s.fma(y, load(self.weight), self.bias.map_or(s.splat(0.0), load));
            let out = &mut self.out[range.clone()];
            if whole { s.store(out, y) } else { s.store_some(out, y) }
        }
    }
}

impl GridBackend for Cpu {
    fn convolution(&self, x: &Tensor, grid: [usize; 2], layer: &Convolution<Tensor>) -> Result<Tensor> {
        self.timed(Kind::Convolution, |_| self.convolved(x, grid, layer))
    }

    fn depthwise(&self, x: &Tensor, grid: [usize; 2], layer: &Depthwise<Tensor>) -> Result<Tensor> {
        self.timed(Kind::Convolution, |_| self.convolved_depthwise(x, grid, layer))
    }

    fn grid_norm(&self, x: &Tensor, over: NormOver, norm: &Norm<Tensor>) -> Result<Tensor> {
        self.timed(Kind::Norm, |_| self.normed(x, over, norm))
    }

    fn activate(&self, x: Tensor, activation: Activation) -> Result<Tensor> {
        if activation == Activation::SwiGlu {
            return Err(Error::argument(
                "activate",
                "swiglu halves the channels; it is an epilogue of `linear`",
            ));
        }
        Ok(self.timed(Kind::Norm, |_| self.activated(x, activation)))
    }

    fn frequency(
        &self,
        x: &Tensor,
        grid: [usize; 2],
        filter: &Frequency<Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Frequency { activation, threshold, .. } = *filter;
        let (w1, b1) = (filter.w1.view(), filter.b1.view());
        let (w2, b2) = (filter.w2.view(), filter.b2.view());
        if grid.iter().all(|&side| side <= MOST_SIDE) {
            let filter = Frequency { w1, b1, w2, b2, activation, threshold };
            return self
                .timed(Kind::Frequency, |context| frequency::frequency(context, x, grid, &filter, residual));
        }
        let [w1, b1] = [w1.to_host()?, b1.to_host()?];
        let [w2, b2] = [w2.to_host()?, b2.to_host()?];
        let filter = Frequency { w1, b1, w2, b2, activation, threshold };
        let residual = residual.map(|residual| residual.view().to_host()).transpose()?;
        self.timed(Kind::Rest, |_| {
            self.adopt(&self.plain()?.frequency(&x.view().to_host()?, grid, &filter, residual.as_ref())?)
        })
    }
}
