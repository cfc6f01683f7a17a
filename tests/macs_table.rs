//! Multiply-adds of every system in one table: a model, a method, what was published of the two or what a tool counts of the
//! official code, and what is counted here. No network runs.

use foveate::{
    Reduction,
    macs::{Convention, Densities, GridConvention, GridMacs, ModelMacs},
    model::{AffNetConfig, Readout, VitConfig, affnet, arch},
    reduction::{Host, Method, OwnWeights},
};

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// Affine layers and both products of attention, in units of 1e9.
    Products,
    /// [`Convention::Fvcore`] without the products of attention: it does not know what attention is as one call.
    Fused,
    /// MCTF's closed form: products and similarities, with the class token alone read out.
    Formula,
    /// [`Convention::Fvcore`], or [`GridConvention::Fvcore`].
    Fvcore,
    /// [`Convention::Torchprofile`].
    Torchprofile,
    /// [`GridConvention::Theoretical`].
    Theoretical,
    /// Per cent of the dense model's torchprofile count that is saved.
    Saved,
    /// Per cent of the dense model's products saved by single weights of this density, at so many tokens.
    Weights(f64, usize),
    /// Per cent of the whole model's products that a compact model saves.
    Compact,
    /// The same where the projection keeps its width, zeros in the place of missing heads, as in the official classes.
    Padded,
    /// The same where attention has its products at full width, too.
    Masked,
}

/// One figure.
struct Row {
    model: &'static str,
    method: String,
    rule: Rule,
    /// Its digits say how exact it is.
    published: &'static str,
    source: &'static str,
    /// Where that is not what is counted here: what is, and why.
    differs: Option<(&'static str, &'static str)>,
}

impl Row {
    /// The same row where another number is counted.
    fn but(self, counted: &'static str, why: &'static str) -> Self {
        Self { differs: Some((counted, why)), ..self }
    }
}

fn row(
    model: &'static str,
    method: impl Into<String>,
    rule: Rule,
    published: &'static str,
    source: &'static str,
) -> Row {
    Row { model, method: method.into(), rule, published, source, differs: None }
}

/// A name of [`arch`], `@` and another image size where it is not its own.
fn config(name: &str) -> VitConfig {
    match name.split_once('@') {
        Some((name, side)) => VitConfig { image: [side.parse().unwrap(); 2], ..arch::config(name).unwrap() },
        None => arch::config(name).unwrap(),
    }
}

fn products(config: &VitConfig) -> f64 {
    let sum = ModelMacs::of(config, &Reduction::None).sum();
    (sum.linear + sum.attention) as f64
}

/// What is counted here.
fn count(row: &Row) -> f64 {
    if affnet::names().any(|name| name == row.model) {
        let macs = GridMacs::sum(&AffNetConfig::published(row.model).unwrap());
        let convention = match row.rule {
            Rule::Theoretical => GridConvention::Theoretical,
            Rule::Fvcore => GridConvention::Fvcore,
            rule => panic!("{rule:?} is no rule for an AFFNet"),
        };
        return macs.total(convention) as f64 / 1e9;
    }
    let mut config = config(row.model);
    if row.rule == Rule::Formula {
        config.readout = Readout::Class;
    }
    let reduction: Reduction = row.method.parse().unwrap();
    reduction.check(&config.host()).unwrap();
    let sum = ModelMacs::of(&config, &reduction).sum();
    let saved = |ours: f64, whole: f64| 100.0 * (1.0 - ours / whole);
    let cut = config.width - config.block(0).heads * config.head_dim();
    let rows = config.depth * config.tokens();
    let whole = || products(&arch::config(&row.model.replace("s2vite", "deit")).unwrap());
    let padded = products(&config) + (rows * config.width * cut) as f64;
    match row.rule {
        Rule::Products => (sum.linear + sum.attention) as f64 / 1e9,
        Rule::Fused => (sum.total(Convention::Fvcore) - sum.attention) as f64 / 1e9,
        Rule::Formula => (sum.linear + sum.attention + sum.matching) as f64 / 1e9,
        Rule::Fvcore => sum.total(Convention::Fvcore) as f64 / 1e9,
        Rule::Torchprofile => sum.total(Convention::Torchprofile) as f64 / 1e9,
        Rule::Saved => {
            let dense = ModelMacs::of(&config, &Reduction::None).sum().total(Convention::Torchprofile);
            saved(sum.total(Convention::Torchprofile) as f64, dense as f64)
        }
        Rule::Weights(density, tokens) => {
            let macs = |density, tokens| Densities::erk(&config, density).unwrap().macs(&config, tokens);
            saved(macs(density, tokens), macs(1.0, config.tokens()))
        }
        Rule::Compact => saved(products(&config), whole()),
        Rule::Padded => saved(padded, whole()),
        Rule::Masked => saved(padded + (2 * rows * config.tokens() * cut) as f64, whole()),
        Rule::Theoretical => panic!("Theoretical is a rule for AFFNets"),
    }
}

/// Why some figures of one decimal differ.
const CUT: &str = "the figure is cut to one decimal, not rounded";

/// Whether a number is the one that these digits name.
fn is(counted: f64, digits: &str) -> bool {
    let decimals = digits.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    (counted - digits.parse::<f64>().unwrap()).abs() <= 0.5001 * 0.1_f64.powi(decimals as i32)
}

fn dense() -> Vec<Row> {
    const DEIT: &str = "fvcore on the official model";
    const TIMM: &str = "timm's model card";
    const CLASSES: &str = "fvcore on the official classes";
    const README: &str = "T2T-ViT's README";
    let of = |model, published, source| row(model, "none", Rule::Fvcore, published, source);
    let mut rows = vec![
        of("deit_tiny", "1.2584", DEIT),
        of("deit_small", "4.6083", DEIT),
        of("deit_base", "17.583", DEIT),
        row("deit_small", "none", Rule::Torchprofile, "4.603567752", "torchprofile on the official model"),
        of("vit_small", "4.61", "ToMe's table 1: the same network as DeiT-S"),
        row("vit_base", "none", Rule::Fused, "16.9", TIMM),
        of("dinov2_large", "507.1", TIMM),
        row("dinov2_small_reg", "none", Rule::Fused, "29.6", TIMM),
        of("lvvit_t", "2.88", CLASSES),
        of("lvvit_s", "6.57", CLASSES),
        of("lvvit_m", "12.70", CLASSES),
        of("lvvit_s@384", "21.95", CLASSES),
        of("t2t_vit_7", "1.1", README).but("1.16", CUT),
        of("t2t_vit_24", "13.8", README).but("13.69", "fvcore counts 13.69 on the official class, too"),
    ];
    for (model, counted) in [
        ("t2t_vit_7", "1.16"),
        ("t2t_vit_10", "1.53"),
        ("t2t_vit_12", "1.77"),
        ("t2t_vit_14", "4.80"),
        ("t2t_vit_19", "8.50"),
        ("t2t_vit_24", "13.69"),
        ("t2t_vit_t_14", "6.11"),
        ("t2t_vit_t_19", "9.81"),
        ("t2t_vit_t_24", "15.00"),
    ] {
        rows.push(of(model, counted, CLASSES));
    }
    for (model, published) in [
        ("t2t_vit_10", "1.5"),
        ("t2t_vit_12", "1.8"),
        ("t2t_vit_14", "4.8"),
        ("t2t_vit_19", "8.5"),
        ("t2t_vit_t_14", "6.1"),
        ("t2t_vit_t_19", "9.8"),
        ("t2t_vit_t_24", "15.0"),
    ] {
        rows.push(of(model, published, README));
    }
    for (model, theoretical, fvcore, published) in [
        ("affnet_et", "0.3619", "0.3748", "0.4"),
        ("affnet_t", "0.7941", "0.8180", "0.8"),
        ("affnet_s", "1.4617", "1.4935", "1.5"),
    ] {
        rows.extend([
            row(model, "none", Rule::Theoretical, theoretical, "printed by the official code"),
            row(model, "none", Rule::Theoretical, published, "AFFNet's README"),
            row(model, "none", Rule::Fvcore, fvcore, CLASSES),
        ]);
    }
    rows
}

fn merging() -> Vec<Row> {
    const TOME: &str = "fvcore on the official model; ToMe's table 4";
    const MAE: &str = "ToMe's table 3";
    const MCTF: &str = "fvcore on the official model; MCTF's table 1";
    const SPEC: &str = "MCTF's closed form";
    const BOARD: &str = "MCTF's figures on LV-ViT-S";
    let of = |model, method: &str, published, source| row(model, method, Rule::Fvcore, published, source);
    vec![
        of("deit_tiny", "tome:r=8", "0.9325", TOME),
        of("deit_tiny", "tome:r=12", "0.7756", TOME),
        of("deit_tiny", "tome:r=13", "0.7373", TOME),
        of("deit_tiny", "tome:r=16", "0.6269", TOME),
        of("deit_small", "tome:r=8", "3.4282", TOME),
        of("deit_small", "tome:r=13", "2.7117", TOME),
        of("deit_small", "tome:r=16", "2.2984", TOME),
        of("deit_small", "tome:r=13,schedule=decreasing", "2.1186", TOME),
        of("deit_base", "tome:r=13", "10.382", TOME),
        of("vit_large", "tome:r=8", "31.0", MAE),
        of("vit_large", "tome:r=8,schedule=decreasing", "22.3", MAE),
        of("deit_tiny", "mctf:r=16", "0.7092", MCTF),
        of("deit_tiny", "mctf:r=8", "0.9830", MCTF),
        of("deit_tiny", "mctf:r=0.35", "0.7481", MCTF),
        of("deit_tiny", "mctf:r=20", "0.6", MCTF),
        of("deit_small", "mctf:r=16", "2.6016", MCTF),
        of("deit_small", "mctf:r=18", "2.3769", MCTF),
        of("deit_small", "mctf:r=8", "3.6033", MCTF),
        of("deit_small", "mctf:r=0.35", "2.7564", MCTF),
        of("deit_small", "mctf:r=20", "2.2", MCTF),
        of("deit_small", "mctf:r=16,ahead=2", "2.983", MCTF),
        of("deit_small", "mctf:r=16,ahead=0", "2.874", MCTF),
        row("lvvit_s", "mctf:r=8", Rule::Formula, "4.91", SPEC),
        row("lvvit_s", "mctf:r=12", Rule::Formula, "4.14", SPEC),
        row("lvvit_s", "mctf:r=16", Rule::Formula, "3.57", SPEC),
        row("lvvit_s", "mctf:r=8", Rule::Formula, "4.9", BOARD),
        of("lvvit_s", "mctf:r=12", "4.2", BOARD),
        of("lvvit_s", "mctf:r=16", "3.6", BOARD),
    ]
}

fn selecting() -> Vec<Row> {
    const RUN: &str = "torchprofile on the official model";
    const LEADERS: &str = "a public list of LV-ViT-S";
    const README: &str = "DynamicViT's README";
    const CLOSED: &str = "the closed form of its products, predictors included";
    const LOGS: &str = "BAT's logs";
    const ABSTRACT: &str = "MSTM's abstract";
    const UNKNOWN: &str = "what is kept where, and what the fusion takes, was never published";
    let of = |model, method: &str, rule, published, source| row(model, method, rule, published, source);
    let mut rows = vec![
        of("lvvit_s", "evit:keep=0.7", Rule::Products, "4.7", LEADERS),
        of("lvvit_s", "evit:keep=0.5", Rule::Products, "3.9", LEADERS),
        of("lvvit_s", "bat:keep=0.7", Rule::Products, "4.7", LEADERS),
        of("deit_small", "dynamicvit:keep=0.7", Rule::Products, "2.98", CLOSED),
        of("deit_base", "dynamicvit:keep=0.7", Rule::Products, "11.48", CLOSED),
        of("deit_small", "dynamicvit:keep=0.7", Rule::Products, "2.9", README).but("2.98", CUT),
        of("deit_base", "dynamicvit:keep=0.7", Rule::Products, "11.4", README).but("11.48", CUT),
        of("lvvit_s", "dynamicvit:keep=0.7", Rule::Products, "4.6", README).but("4.65", CUT),
        of("lvvit_s", "dynamicvit:keep=0.5", Rule::Products, "3.7", README).but("3.79", CUT),
        of("lvvit_m", "dynamicvit:keep=0.7", Rule::Products, "8.5", README).but("8.59", CUT),
        of("deit_small", "mstm:keep=0.7", Rule::Saved, "33", ABSTRACT).but("34.7", UNKNOWN),
        of("deit_small", "mstm:keep=0.7,scales=none", Rule::Saved, "33", ABSTRACT).but("34.8", UNKNOWN),
    ];
    for (keep, fused, dropped) in [
        ("0.9", "4.025801396", "3.991992275"),
        ("0.8", "3.480450218", "3.447432641"),
        ("0.7", "3.032105162", "2.999739005"),
        ("0.6", "2.637750292", "2.610805579"),
        ("0.5", "2.311015474", "2.284472521"),
        ("0.4", "2.045475495", "2.024719309"),
        ("0.3", "1.818499757", "1.802688951"),
        ("0.2", "1.645651225", "1.624626460"),
    ] {
        rows.extend([
            row("deit_small", format!("evit:keep={keep}"), Rule::Torchprofile, fused, RUN),
            row("deit_small", format!("evit:keep={keep},fuse=false"), Rule::Torchprofile, dropped, RUN),
        ]);
    }
    for (keep, published, counted) in [
        ("0.7", "3.005", "3.000"),
        ("0.6", "2.583", "2.611"),
        ("0.5", "2.344", "2.285"),
        ("0.4", "2.083", "2.025"),
        ("0.3", "1.823", "1.803"),
        ("0.2", "1.645", "1.625"),
    ] {
        let published = row("deit_small", format!("bat:keep={keep}"), Rule::Torchprofile, published, LOGS);
        rows.push(published.but(counted, "its numbers of pairs and clusters were never published"));
    }
    rows
}

fn sparse() -> Vec<Row> {
    const RULE: &str = "SViTE's rule, by its specification";
    const TABLE: &str = "S2ViTE's table";
    const SECOND_HAND: &str = "how the paper counts is not known beyond the rule below, which this follows";
    const SHORTER: &str = "the official classes leave the projection whole; here it is cut, too";
    const PLACES: &str =
        "k or k + 1 tokens survive, so there are places for k + 1; and torchprofile counts norms";
    let mut rows = vec![
        row("deit_small", "none", Rule::Weights(0.5, 187), "49.32", "SViTE's abstract")
            .but("49.24", SECOND_HAND),
        row("s2vite_tiny", "none", Rule::Masked, "23.69", TABLE).but("23.68", SECOND_HAND),
        row("s2vite_small", "none", Rule::Masked, "31.63", TABLE).but("31.86", SECOND_HAND),
        row("s2vite_base", "none", Rule::Masked, "33.13", TABLE).but("33.35", SECOND_HAND),
        row("s2vite_tiny", "none", Rule::Padded, "28.43", RULE),
        row("s2vite_small", "none", Rule::Padded, "34.45", RULE),
        row("s2vite_base", "none", Rule::Padded, "34.70", RULE),
        row("s2vite_tiny", "none", Rule::Compact, "28.43", RULE).but("30.75", SHORTER),
        row("s2vite_small", "none", Rule::Compact, "34.45", RULE).but("36.98", SHORTER),
        row("s2vite_base", "none", Rule::Compact, "34.70", RULE).but("37.35", SHORTER),
        row("deit_small", "svite:tokens=138", Rule::Saved, "31.20", RULE).but("30.69", PLACES),
    ];
    for (model, density, saved) in [
        ("deit_tiny", 0.7, ["25.56", "30.00", "34.38", "50.73"]),
        ("deit_tiny", 0.6, ["34.14", "38.15", "42.09", "56.76"]),
        ("deit_tiny", 0.5, ["42.74", "46.32", "49.82", "62.80"]),
        ("deit_small", 0.7, ["27.73", "31.75", "35.73", "50.89"]),
        ("deit_small", 0.6, ["36.93", "40.49", "44.01", "57.36"]),
        ("deit_small", 0.5, ["46.15", "49.24", "52.30", "63.83"]),
        ("deit_base", 0.7, ["28.98", "32.76", "36.52", "50.99"]),
        ("deit_base", 0.6, ["38.54", "41.84", "45.12", "57.71"]),
        ("deit_base", 0.5, ["48.10", "50.92", "53.72", "64.42"]),
    ] {
        for (tokens, saved) in [197, 187, 177, 138].into_iter().zip(saved) {
            rows.push(row(model, "none", Rule::Weights(density, tokens), saved, RULE));
        }
    }
    rows
}

#[test]
fn every_system_counts_what_was_published() {
    let rows: Vec<Row> = [dense(), merging(), selecting(), sparse()].into_iter().flatten().collect();
    let mut wrong = Vec::new();
    for row in &rows {
        let Row { model, method, rule, published, source, differs } = row;
        let counted = count(row);
        let right = match differs {
            None => is(counted, published),
            // A difference that is none any more is to be struck out.
            Some((ours, why)) => is(counted, ours) && !is(counted, published) && !why.is_empty(),
        };
        if !right {
            wrong.push(format!("{model} with {method}, {rule:?}: {counted:.6}, {published} by {source}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// MSTM fuses scales by projections, of which a model may have some, none or all.
#[test]
fn projections_that_a_model_lacks_cost_nothing() {
    let config = config("deit_small");
    let reduction: Reduction = "mstm:keep=0.7,scales=2/4".parse().unwrap();
    let macs = |projections| {
        let weights = Some(OwnWeights { projections, ..OwnWeights::default() });
        ModelMacs::of_host(&config, &Host { weights, ..config.host() }, &reduction).sum().linear
    };
    // 7x7 windows of side 2 and 4x4 of side 4.
    let square = 384 * 384;
    assert_eq!(macs(1 << 2) - macs(0), 49 * square);
    assert_eq!(macs(1 << 2 | 1 << 4) - macs(0), (49 + 16) * square);
    assert_eq!(ModelMacs::of(&config, &reduction).sum().linear, macs(1 << 2 | 1 << 4));
}
