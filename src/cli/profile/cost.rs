//! What a batch costs: counted by block, and timed where time says something.

use foveate::{
    Reduction,
    macs::{Convention, Macs, ModelMacs},
    model::VitConfig,
    reduction::{Host, Method},
};

use crate::cli::{
    launches::{Launch, Launches},
    measure::median,
    traffic::{Parameters, block_bytes, embed_bytes, head_bytes, own_bytes},
};

/// One stretch of the forward pass: the embedding, a block, or the head.
pub(super) struct Segment {
    pub(super) name: String,
    /// Entering and leaving it.
    pub(super) tokens: [usize; 2],
    pub(super) macs: u64,
    pub(super) bytes: u64,
    /// What the device is given to do; none on the processor.
    pub(super) launches: Option<Vec<Launch>>,
    pub(super) milliseconds: Option<f64>,
}

/// What a batch costs under one method.
pub(super) struct Profile {
    pub(super) segments: Vec<Segment>,
    /// Median over the runs of their whole time.
    pub(super) milliseconds: Option<f64>,
    pub(super) token_counts: Vec<usize>,
    pub(super) batch: usize,
    /// Bytes beside the weights of a pass planned as a whole, and the most of them in use at a time.
    pub(super) memory: Option<[usize; 2]>,
}

impl Profile {
    /// For values of `value` bytes, where nothing better is known than what operations must move; launches know what they
    /// do. `times` are the milliseconds of each segment, per run; none where nothing was timed.
    pub(super) fn new(
        (config, host): (&VitConfig, &Host),
        parameters: &Parameters,
        method: &Reduction,
        batch: usize,
        value: u64,
        launches: Option<Launches>,
        times: &[Vec<f64>],
    ) -> Self {
        let macs = ModelMacs::of_host(config, host, method);
        let images = batch as u64;
        let of_runs = |of: &dyn Fn(&Vec<f64>) -> f64| {
            let values: Vec<f64> = times.iter().map(of).collect();
            (!values.is_empty()).then(|| median(&values))
        };
        let total = |macs: &Macs| images * macs.total(Convention::Fvcore);
        let counts = macs.token_counts.clone();
        let (first, last) = (counts[0], counts[config.depth]);
        let mut segments = Vec::new();
        let mut add = |name: String, tokens: [usize; 2], macs: &Macs, bytes: u64| {
            let at = segments.len();
            let milliseconds = of_runs(&|run| run[at]);
            let launches = launches.as_ref().map(|launches| launches.segments[at].clone());
            let moved = |launches: &Vec<Launch>| launches.iter().map(|launch| launch.bytes).sum();
            let bytes = launches.as_ref().map_or(bytes, moved);
            segments.push(Segment { name, tokens, macs: total(macs), bytes, launches, milliseconds });
        };
        let bytes = embed_bytes(config, parameters, images, value);
        add("embed".to_owned(), [first, first], &macs.embed, bytes);
        for layer in 0..config.depth {
            let step = method.step(layer, counts[layer], host);
            let (tokens, of_block) = (counts[layer] as u64, parameters.blocks[layer]);
            let bytes = block_bytes(config, (layer, of_block), tokens, step.as_ref(), images, value)
                + own_bytes(
                    (config, parameters),
                    (method, layer),
                    counts[layer],
                    step.as_ref(),
                    images,
                    value,
                );
            let name = format!("block {layer}");
            add(name, [counts[layer], counts[layer + 1]], &macs.blocks[layer], bytes);
        }
        let bytes = head_bytes(config, parameters, last as u64, images, value);
        add("head".to_owned(), [last, last], &macs.head, bytes);
        let milliseconds = of_runs(&|run| run.iter().sum());
        let memory = launches.map(|launches| [launches.arena_bytes, launches.live_bytes]);
        Self { segments, milliseconds, token_counts: counts, batch, memory }
    }

    /// All segments as one, with the median of the runs' whole times.
    pub(super) fn total(&self) -> Segment {
        let ends = [self.token_counts[0], self.token_counts[self.token_counts.len() - 1]];
        let (macs, bytes) = (self.macs(), self.bytes());
        let each = self.segments.iter().map(|segment| segment.launches.clone());
        let launches = each.collect::<Option<Vec<_>>>().map(|each| each.concat());
        let name = "total".to_owned();
        Segment { name, tokens: ends, macs, bytes, launches, milliseconds: self.milliseconds }
    }

    pub(super) fn macs(&self) -> u64 {
        self.segments.iter().map(|segment| segment.macs).sum()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    pub(super) fn images_per_second(&self) -> Option<f64> {
        self.milliseconds.map(|milliseconds| self.batch as f64 / (milliseconds / 1e3).max(1e-9))
    }

    /// The segment's share of the segments' time.
    pub(super) fn share(&self, segment: &Segment) -> Option<f64> {
        let all: f64 = self.segments.iter().filter_map(|segment| segment.milliseconds).sum();
        segment.milliseconds.map(|milliseconds| milliseconds / all.max(1e-9))
    }
}
