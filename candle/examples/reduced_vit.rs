//! A vision transformer written with candle's layers, made faster by token reduction.
//!
//!     cargo run --release -p foveate-candle --example reduced_vit
//!
//! The model is built as candle-transformers builds its vision transformers (their fields are private, so nothing can be put
//! between their layers from outside), from a checkpoint in timm's naming: the one of `foveate demo`. Dense it uses nothing of
//! foveate. Reduced, three lines of a block change: attention, who goes, and the LayerNorm before the MLP. The logits are
//! compared with those of foveate's own model, and all are timed in turn.
//!
//! `-- checkpoint.safetensors image.png ...` takes another ViT or DeiT in timm's naming, and other images.

use std::{error::Error, path::PathBuf, time::Instant};

use candle_core::{D, DType, Device, IndexOp, Result, Tensor};
use candle_nn::{
    Conv2d, Conv2dConfig, LayerNorm, Linear, Module, VarBuilder, conv2d, layer_norm, linear, ops::softmax,
};
use foveate::{
    Images, Pixels, Reduction,
    image::{Picture, batch},
    model::{Vit as FoveateVit, VitConfig},
    reduction::{Host, Method},
    reference::Reference,
    weights::{Overrides, load_vit_file},
};
use foveate_candle::{
    Attraction, Heads, Matching, Metric, Norm, Pooling, Select, Weighting, attention, matching, merge, select,
};

/// The reductions that are shown.
const REDUCTIONS: [&str; 4] =
    ["tome:r=13", "tome:r=16,schedule=decreasing", "evit:keep=0.7", "evit:keep=0.5"];

/// Rounds of the timing; in each, everything runs once.
const ROUNDS: usize = 9;

struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Block {
    fn new(config: &VitConfig, vb: &VarBuilder) -> Result<Self> {
        let (width, hidden) = (config.width, config.hidden);
        let norm = |name: &str| layer_norm(width, f64::from(config.norm_eps), vb.pp(name));
        Ok(Self {
            norm1: norm("norm1")?,
            qkv: linear(width, 3 * width, vb.pp("attn.qkv"))?,
            proj: linear(width, width, vb.pp("attn.proj"))?,
            norm2: norm("norm2")?,
            fc1: linear(width, hidden, vb.pp("mlp.fc1"))?,
            fc2: linear(hidden, width, vb.pp("mlp.fc2"))?,
        })
    }

    /// The block as candle-transformers has it.
    fn dense(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (b, n, c) = x.dims3()?;
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?;
        let qkv = qkv.reshape((b, n, 3, heads, c / heads))?.permute((2, 0, 3, 1, 4))?;
        let q = (qkv.i(0)?.contiguous()? * ((c / heads) as f64).powf(-0.5))?;
        let (k, v) = (qkv.i(1)?.contiguous()?, qkv.i(2)?.contiguous()?);
        let map = softmax(&q.matmul(&k.t()?)?, D::Minus1)?;
        let context = map.matmul(&v)?.transpose(1, 2)?.reshape((b, n, c))?;
        let x = (x + self.proj.forward(&context)?)?;
        let mlp = self.mlp(&self.norm2.forward(&x)?)?;
        x + mlp
    }

    /// The block with its tokens reduced after the attention. `sizes` are those of the tokens, once some were merged.
    fn reduced(
        &self,
        x: &Tensor,
        sizes: Option<Tensor>,
        layer: usize,
        host: &Host,
        reduction: &Reduction,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (_, tokens, width) = x.dims3()?;
        let step = reduction.step(layer, tokens, host);
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?;
        let head_dim = width / host.heads;
        let heads = Heads {
            packed: &qkv,
            heads: host.heads,
            head_dim,
            scale: (head_dim as f32).powf(-0.5),
            sizes: sizes.as_ref().filter(|_| reduction.proportional_attention()),
        };
        let (context, scores) = attention(&heads, step.map(|step| step.scores).unwrap_or_default())?;
        let x = (x + self.proj.forward(&context)?)?;

        let Some(step) = step else {
            let mlp = self.mlp(&self.norm2.forward(&x)?)?;
            return Ok(((x + mlp)?, sizes));
        };
        let plan = match (reduction, &scores.class) {
            (Reduction::Evit(evit), Some(class_scores)) => select(&Select {
                class_scores,
                special: host.special,
                keep: step.tokens - host.special - usize::from(evit.fuse),
                fuse: evit.fuse,
            })?,
            (Reduction::Tome(_), _) => matching(&Matching {
                metric: Metric::Keys(&heads),
                attraction: Attraction::Cosine,
                weighting: Weighting::Size(sizes.as_ref()),
                special: host.special,
                merges: tokens - step.tokens,
                both_ways: false,
            })?,
            (other, _) => candle_core::bail!("this example shows ToMe and EViT, not {other}"),
        };
        let norm2 = Norm {
            weight: self.norm2.weight().clone(),
            bias: self.norm2.bias().cloned(),
            eps: self.norm2.eps() as f32,
        };
        let merged = merge(&x, sizes.as_ref(), &plan, Pooling::Weighted, Some(&norm2))?;
        let Some(normed) = merged.normed else { candle_core::bail!("a LayerNorm was asked for") };
        Ok(((merged.tokens + self.mlp(&normed)?)?, Some(merged.sizes)))
    }

    fn mlp(&self, normed: &Tensor) -> Result<Tensor> {
        self.fc2.forward(&self.fc1.forward(normed)?.gelu_erf()?)
    }
}

/// A ViT or DeiT whose head reads the class token.
struct Vit {
    host: Host,
    mean: Tensor,
    std: Tensor,
    patch: Conv2d,
    class: Tensor,
    position: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
}

impl Vit {
    fn new(config: &VitConfig, vb: &VarBuilder) -> Result<Self> {
        let &VitConfig { width, channels, depth, classes, .. } = config;
        let stride = Conv2dConfig { stride: config.patch[0], ..Conv2dConfig::default() };
        let per_channel = |values: &[f32]| Tensor::from_slice(values, (1, channels, 1, 1), vb.device());
        let blocks = (0..depth).map(|layer| Block::new(config, &vb.pp(format!("blocks.{layer}"))));
        Ok(Self {
            host: config.host(),
            mean: per_channel(&config.transform.mean)?,
            std: per_channel(&config.transform.std)?,
            patch: conv2d(channels, width, config.patch[0], stride, vb.pp("patch_embed.proj"))?,
            class: vb.get((1, 1, width), "cls_token")?,
            position: vb.get((1, config.tokens(), width), "pos_embed")?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: layer_norm(width, f64::from(config.norm_eps), vb.pp("norm"))?,
            head: linear(width, classes, vb.pp("head"))?,
        })
    }

    /// Pixels 0 to 255, (B, channels, H, W), to tokens.
    fn embed(&self, images: &Tensor) -> Result<Tensor> {
        let pixels = (images.to_dtype(DType::F32)? / 255.0)?;
        let pixels = pixels.broadcast_sub(&self.mean)?.broadcast_div(&self.std)?;
        let patches = self.patch.forward(&pixels)?.flatten_from(2)?.transpose(1, 2)?;
        let (batch, _, width) = patches.dims3()?;
        let class = self.class.broadcast_as((batch, 1, width))?;
        Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.position)
    }

    fn read_out(&self, x: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.norm.forward(&x.i((.., 0))?.contiguous()?)?)
    }

    /// Logits, with candle alone.
    fn dense(&self, images: &Tensor) -> Result<Tensor> {
        let mut x = self.embed(images)?;
        for block in &self.blocks {
            x = block.dense(&x, self.host.heads)?;
        }
        self.read_out(&x)
    }

    /// Logits, and how many tokens were left at the end.
    fn reduced(&self, images: &Tensor, reduction: &Reduction) -> Result<(Tensor, usize)> {
        let (mut x, mut sizes) = (self.embed(images)?, None);
        for (layer, block) in self.blocks.iter().enumerate() {
            (x, sizes) = block.reduced(&x, sizes, layer, &self.host, reduction)?;
        }
        Ok((self.read_out(&x)?, x.dim(1)?))
    }
}

/// The model twice, in candle and in foveate, and images for both.
struct Setting {
    candle: Vit,
    foveate: FoveateVit<Reference>,
    tensor: Tensor,
    images: Images,
}

impl Setting {
    fn new(checkpoint: &PathBuf, files: &[PathBuf]) -> std::result::Result<Self, Box<dyn Error>> {
        let foveate = load_vit_file(checkpoint, &Overrides::default())?.build(Reference::new())?;
        let config = foveate.config();
        let vb = VarBuilder::from_buffered_safetensors(std::fs::read(checkpoint)?, DType::F32, &Device::Cpu)?;
        let candle = Vit::new(config, &vb)?;
        let mut pictures = Vec::new();
        for file in files {
            pictures.push(config.transform.apply(&picture(file)?, config.image)?);
        }
        let images = batch(&pictures)?;
        let Pixels::U8(pixels) = images.pixels() else { return Err("expected 8-bit pixels".into()) };
        let tensor = Tensor::from_slice(pixels, &images.shape()[..], &Device::Cpu)?;
        Ok(Self { candle, foveate, tensor, images })
    }

    /// The largest difference of candle's logits from foveate's, over the largest logit; images whose class is the same in
    /// both; and the tokens that are left.
    fn compare(&self, reduction: &Reduction) -> std::result::Result<(f32, usize, usize), Box<dyn Error>> {
        let expected = self.foveate.forward(&self.images, reduction)?;
        let left = expected.token_counts.last().copied().unwrap_or_default();
        let expected = expected.logits.ok_or("the checkpoint has no head")?;
        let (logits, tokens) = match reduction {
            Reduction::None => (self.candle.dense(&self.tensor)?, left),
            _ => self.candle.reduced(&self.tensor, reduction)?,
        };
        if tokens != left {
            return Err(format!("{reduction} leaves {tokens} tokens, in foveate's model {left}").into());
        }
        let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let pairs = || logits.iter().zip(expected.data());
        let largest = expected.data().iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        let difference = pairs().fold(0.0, |most: f32, (x, y)| most.max((x - y).abs()));
        let width = expected.shape()[1];
        let class = |row: &[f32]| (0..width).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        let rows = logits.chunks(width).zip(expected.data().chunks(width));
        Ok((difference / largest, rows.filter(|(a, b)| class(a) == class(b)).count(), left))
    }
}

/// A PNG file in grey or RGB.
fn picture(file: &PathBuf) -> std::result::Result<Picture, Box<dyn Error>> {
    let decoded = image::open(file)?;
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    Ok(if decoded.color().has_color() {
        Picture::new(width, height, 3, decoded.into_rgb8().into_raw())?
    } else {
        Picture::new(width, height, 1, decoded.into_luma8().into_raw())?
    })
}

/// Median seconds of each work, all timed in turn, and the median of its speed-up over the first within a round.
fn in_turn(works: &[Box<dyn Fn() -> Result<()> + '_>]) -> Result<Vec<(f64, f64)>> {
    let mut rounds = vec![Vec::new(); works.len()];
    for round in 0..=ROUNDS {
        for (work, times) in works.iter().zip(&mut rounds) {
            let start = Instant::now();
            work()?;
            // The first round warms up.
            if round > 0 {
                times.push(start.elapsed().as_secs_f64());
            }
        }
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let speedup =
        |times: &[f64]| median(rounds[0].iter().zip(times).map(|(dense, time)| dense / time).collect());
    Ok(rounds.iter().map(|times| (median(times.clone()), speedup(times))).collect())
}

fn demo_files() -> std::result::Result<(PathBuf, Vec<PathBuf>), Box<dyn Error>> {
    let assets = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets"));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(assets.join("fashion"))? {
        files.push(entry?.path());
    }
    files.sort();
    Ok((assets.join("fashion_deit_f16.safetensors"), files))
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let mut given = std::env::args_os().skip(1).map(PathBuf::from);
    let (checkpoint, files) = match given.next() {
        Some(checkpoint) => (checkpoint, given.collect()),
        None => demo_files()?,
    };
    let setting = Setting::new(&checkpoint, &files)?;
    let count = files.len();
    println!("{}: {count} images, {} tokens", checkpoint.display(), setting.candle.host_tokens());

    let reductions = REDUCTIONS.map(str::parse::<Reduction>);
    let reductions = reductions.into_iter().collect::<foveate::Result<Vec<_>>>()?;
    let mut works: Vec<Box<dyn Fn() -> Result<()> + '_>> = vec![
        Box::new(|| setting.candle.dense(&setting.tensor).map(drop)),
        Box::new(|| setting.candle.reduced(&setting.tensor, &Reduction::None).map(drop)),
    ];
    for reduction in &reductions {
        works.push(Box::new(|| setting.candle.reduced(&setting.tensor, reduction).map(drop)));
    }
    let times = in_turn(&works)?;

    println!("speeds in turn, the median of {ROUNDS} rounds; logits beside those of foveate's own model\n");
    println!(
        "{:<44}{:>9}{:>10}{:>9}{:>15}{:>13}",
        "", "images/s", "speed-up", "tokens", "logits differ", "same class"
    );
    let names = ["candle's own attention", "foveate's attention"].map(str::to_owned);
    let names = names.into_iter().chain(reductions.iter().map(ToString::to_string));
    let compared = [Reduction::None, Reduction::None].into_iter().chain(reductions.iter().cloned());
    for ((name, reduction), (seconds, speedup)) in names.zip(compared).zip(times) {
        let (difference, same, tokens) = setting.compare(&reduction)?;
        println!(
            "{name:<44}{:>9.1}{speedup:>9.2}x{tokens:>9}{difference:>15.1e}{:>13}",
            count as f64 / seconds,
            format!("{same}/{count}")
        );
    }
    Ok(())
}

impl Vit {
    fn host_tokens(&self) -> usize {
        self.position.dims()[1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounding in twelve blocks: each adds a few times `2^-24` of its largest values.
    const TOLERANCE: f32 = 2e-5;

    #[test]
    fn reduced_logits_are_those_of_foveates_model() {
        let (checkpoint, files) = demo_files().unwrap();
        let setting = Setting::new(&checkpoint, &files[..2]).unwrap();
        for text in ["none"].iter().chain(&REDUCTIONS) {
            let (difference, same, _) = setting.compare(&text.parse().unwrap()).unwrap();
            assert!(difference < TOLERANCE, "{text}: logits differ by {difference:e} of the largest");
            assert_eq!(same, 2, "{text}");
        }
    }

    #[test]
    fn another_reduction_has_other_logits() {
        let (checkpoint, files) = demo_files().unwrap();
        let setting = Setting::new(&checkpoint, &files[..1]).unwrap();
        let logits = |text: &str| {
            let reduction = text.parse().unwrap();
            setting.candle.reduced(&setting.tensor, &reduction).unwrap().0.to_vec2::<f32>().unwrap()
        };
        let (one, other) = (logits("tome:r=13"), logits("tome:r=12"));
        assert!(one[0].iter().zip(&other[0]).any(|(a, b)| (a - b).abs() > 1e-3));
        assert!(setting.candle.reduced(&setting.tensor, &"mctf:r=16".parse().unwrap()).is_err());
    }
}
