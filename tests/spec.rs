//! Specification strings: printed back as they were read, refused in one line.

use foveate::{
    Reduction,
    reduction::{Host, Method, OwnWeights},
};
use proptest::prelude::*;

#[test]
fn canonical_strings_are_printed_back() {
    for text in [
        "none",
        "tome:r=13",
        "tome:r=16,schedule=decreasing",
        "tome:r=8,schedule=increasing",
        "tome:r=8,inflection=-0.5",
        "tome:r=[8,8,0,4]",
        "tome:r=8,proportional=false",
        "mctf:r=16",
        "mctf:r=0.35",
        "mctf:r=0.35,layers=3/6/9",
        "mctf:r=8,layers=1/2,ahead=2,tau=0/20/40,both=false,pool=max,proportional=false",
        "evit:keep=0.7",
        "evit:keep=0.7,layers=3/6/9,fuse=false",
        "evit:keep=[1,0.7,0.5]",
        "evit:tokens=[-,40,-,25]",
        "evit:keep=[1,0.7],tokens=[-,40]",
        "dynamicvit:keep=0.7",
        "dynamicvit:keep=[0.7,0.5,0.1]",
        "dynamicvit:keep=[0.6,0.3],layers=1/3",
        "svite:tokens=138",
        "svite:tokens=99,mode=mask,layerwise=true",
        "bat:keep=0.7",
        "bat:keep=[1,0.5,1],pairs=[4,3],clusters=2,neighbours=5",
        "bat:keep=0.6,layers=3/6,pairs=0",
        "mstm:keep=0.7",
        "mstm:keep=[1,0.7],scales=none",
        "mstm:keep=0.5,layers=1,scales=2/4",
    ] {
        let reduction: Reduction = text.parse().unwrap();
        assert_eq!(reduction.to_string(), text);
    }
}

#[test]
fn short_forms_become_canonical() {
    for (text, canonical) in [
        ("tome", "tome:r=13"),
        ("mctf", "mctf:r=16"),
        ("evit", "evit:keep=0.7"),
        (" tome : r = 13 ", "tome:r=13"),
        ("tome:r=13,schedule=constant", "tome:r=13"),
        ("tome:r=13,inflection=-1", "tome:r=13,schedule=decreasing"),
        ("mctf:r=16,ahead=1,tau=1/20/40,both=true,pool=attention", "mctf:r=16"),
        ("evit:fuse=true", "evit:keep=0.7"),
        ("dynamicvit", "dynamicvit:keep=0.7"),
        ("svite", "svite:tokens=138"),
        ("svite:mode=gather,layerwise=false", "svite:tokens=138"),
        ("bat:pairs=[3]", "bat:keep=0.7,pairs=3"),
        ("bat:neighbours=0", "bat:keep=0.7"),
        ("mstm:scales=2", "mstm:keep=0.7"),
        ("tome:r=[]", "tome:r=[]"),
    ] {
        let reduction: Reduction = text.parse().unwrap();
        assert_eq!(reduction.to_string(), canonical, "{text}");
    }
}

#[test]
fn bad_strings_are_refused_with_the_remedy() {
    for (text, remedy) in [
        ("", "unknown method ``; known are none, tome, mctf, evit"),
        ("tomato:r=3", "unknown method `tomato`"),
        ("none:r=3", "unknown key `r`"),
        ("tome:r", "`r` is not of the form key=value"),
        ("tome:r=-3", "whole number"),
        ("tome:r=1.5", "whole number"),
        ("tome:r=99999999999999999999", "whole number"),
        ("tome:r=[1,x]", "list of them"),
        ("tome:r=3,r=4", "given twice"),
        ("tome:r=3,keep=0.5", "unknown key `keep`; known are r, schedule, inflection, proportional"),
        ("tome:r=3,schedule=sideways", "constant, decreasing or increasing"),
        ("tome:r=3,inflection=2", "from -1"),
        ("tome:r=3,inflection=nan", "from -1"),
        ("tome:r=[3],schedule=decreasing", "a list of r is a schedule already"),
        ("tome:r=3,schedule=constant,inflection=0", "give one of them"),
        ("tome:proportional=maybe", "true or false"),
        ("mctf:r=0", "share of them between 0 and 1"),
        ("mctf:r=1.5", "share of them between 0 and 1"),
        ("mctf:r=nan", "share of them between 0 and 1"),
        ("mctf:layers=3/2", "ascending block numbers"),
        ("mctf:ahead=3", "0 (off)"),
        ("mctf:tau=1/2", "three temperatures"),
        ("mctf:tau=1/2/-3", "three temperatures"),
        ("mctf:pool=sum", "attention, size, max or mean"),
        ("evit:keep=0", "above 0 and up to 1"),
        ("evit:keep=1.1", "above 0 and up to 1"),
        ("evit:keep=[0.7],layers=3", "leave layers out"),
        ("evit:tokens=12", "one count"),
        ("evit:tokens=[0]", "one count"),
        ("dynamicvit:keep=0", "above 0 and up to 1"),
        ("dynamicvit:keep=[]", "above 0 and up to 1"),
        ("dynamicvit:keep=[0.7,0.5]", "2 shares for 3 cuts"),
        ("dynamicvit:keep=[0.7],layers=1/2", "1 shares for 2 cuts"),
        ("dynamicvit:layers=3/3", "ascending block numbers"),
        ("svite:tokens=0", "from 1 to 65536"),
        ("svite:mode=drop", "gather or mask"),
        ("bat:keep=0", "above 0 and up to 1"),
        ("bat:keep=[0.7],layers=3", "leave layers out"),
        ("bat:pairs=[]", "one per reducing block"),
        ("bat:clusters=-1", "one per reducing block"),
        ("mstm:scales=1", "ascending window sides from 2 to 63"),
        ("mstm:scales=4/2", "ascending window sides from 2 to 63"),
    ] {
        let error = text.parse::<Reduction>().unwrap_err().to_string();
        assert!(error.contains(remedy), "{text}: {error}");
        assert!(!error.contains('\n'));
    }
}

#[test]
fn unsuitable_hosts_are_refused() {
    let host = Host { depth: 4, special: 0, class_token: false, width: 64, heads: 1, ..Host::default() };
    let check = |spec: &str| spec.parse::<Reduction>().unwrap().check(&host);
    assert!(check("evit").unwrap_err().to_string().contains("needs a class token"));
    assert!(check("mctf:r=8,layers=3/6").unwrap_err().to_string().contains("block 6 does not exist"));
    assert!(check("tome:r=1000").is_ok());
    let host = Host { special: 1, class_token: true, ..host };
    let error = "evit:keep=[1,1,1,1,0.5]".parse::<Reduction>().unwrap().check(&host).unwrap_err();
    assert!(error.to_string().contains("block 4 does not exist, the model has 4"));
}

#[test]
fn a_method_without_its_weights_is_refused() {
    let host = Host {
        depth: 12,
        special: 1,
        class_token: true,
        width: 64,
        heads: 1,
        grid: [4, 4],
        aux_head: false,
        weights: None,
    };
    let check = |spec: &str, host: &Host| {
        spec.parse::<Reduction>().unwrap().check(host).map_err(|error| error.to_string())
    };
    assert_eq!(check("dynamicvit", &host), Ok(()), "a shape alone has no weights to lack");
    let with =
        |predictors| Host { weights: Some(OwnWeights { predictors, ..OwnWeights::default() }), ..host };
    let message = check("dynamicvit", &with(2)).unwrap_err();
    for part in ["score_predictor.0.* to score_predictor.2.*", "the model has 2", "trained with DynamicViT"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(check("dynamicvit", &with(3)), Ok(()));
    assert_eq!(check("dynamicvit:keep=[0.5,0.2],layers=0/7", &with(2)), Ok(()));
    let message = check("dynamicvit:keep=[0.5,0.06],layers=0/7", &with(2)).unwrap_err();
    assert!(message.contains("keeps 0.06 of 16 patches before block 7: none"), "{message}");
    let message = check("dynamicvit:keep=0.7,layers=3/12", &with(2)).unwrap_err();
    assert!(message.contains("block 12 does not exist"), "{message}");
    let message = check("svite", &with(3)).unwrap_err();
    assert!(message.contains("gumbel.weight") && message.contains("the model has none"), "{message}");
    let selector = OwnWeights { selector: true, ..OwnWeights::default() };
    let host_with_selector = Host { weights: Some(selector), ..host };
    assert_eq!(check("svite:tokens=9", &host_with_selector), Ok(()));
    let message = check("svite:layerwise=true", &host_with_selector).unwrap_err();
    assert!(message.contains("blocks.0.attn.gumbel.* to blocks.11.attn.gumbel.*"), "{message}");
    assert!(check("bat", &Host { class_token: false, ..host }).unwrap_err().contains("class token"));
    assert!(check("mstm:layers=12", &host).unwrap_err().contains("block 12 does not exist"));
    let shallow = Host { depth: 2, ..with(3) };
    assert!(check("dynamicvit", &shallow).unwrap_err().contains("give layers"));
}

/// The counts of the official code for 196 patches, and that shares are of the first ones: a larger later share keeps all.
#[test]
fn counts_by_hand() {
    let host = Host {
        depth: 12,
        special: 1,
        class_token: true,
        width: 64,
        heads: 1,
        grid: [14, 14],
        aux_head: false,
        weights: None,
    };
    let counts = |spec: &str| {
        let mut counts = spec.parse::<Reduction>().unwrap().token_counts(197, &host);
        counts.dedup();
        counts
    };
    for (rate, left) in [
        (0.9, [176, 158, 142]),
        (0.8, [156, 125, 100]),
        (0.7, [137, 96, 67]),
        (0.6, [117, 70, 42]),
        (0.5, [98, 49, 24]),
    ] {
        let want: Vec<usize> = std::iter::once(197).chain(left.map(|n| n + 1)).collect();
        assert_eq!(counts(&format!("dynamicvit:keep={rate}")), want);
    }
    assert_eq!(counts("dynamicvit:keep=[0.5,0.6,0.25]"), [197, 99, 50]);
    assert_eq!(counts("dynamicvit:keep=1"), [197]);
    // The class token competes: k + 1 places. As many tokens as EViT without its fused one.
    assert_eq!(counts("svite:tokens=138"), [197, 139]);
    assert_eq!(counts("svite:tokens=138,mode=mask"), [197]);
    assert_eq!(counts("svite:tokens=197"), [197]);
    let evit = counts("evit:keep=0.7,fuse=false");
    assert_eq!(counts("bat:keep=0.7"), evit);
    assert_eq!(counts("mstm:keep=0.7"), evit);
    assert_eq!(counts("bat:keep=0.5,pairs=9,clusters=[5,4,3]"), [197, 95, 43, 16]);
}

proptest! {
    #[test]
    fn anything_parses_or_is_refused(text in "[a-z:=,/.\\[\\]0-9 -]{0,40}") {
        if let Ok(reduction) = text.parse::<Reduction>() {
            let printed = reduction.to_string();
            prop_assert_eq!(&printed.parse::<Reduction>().unwrap(), &reduction);
        }
    }

    #[test]
    fn near_misses_parse_or_are_refused(
        name in "none|tome|mctf|evit|dynamicvit|svite|bat|mstm",
        pairs in prop::collection::vec(("r|keep|layers|tokens|fuse|tau|ahead|pool|schedule|inflection|both",
            "[0-9]{1,3}|0\\.[0-9]{1,3}|\\[[0-9,.-]{0,9}\\]|[0-9]/[0-9]/[0-9]|true|false|max|decreasing|-1|é|"), 0..4),
    ) {
        let fields: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let text = format!("{name}:{}", fields.join(","));
        if let Ok(reduction) = text.parse::<Reduction>() {
            let printed = reduction.to_string();
            prop_assert_eq!(&printed.parse::<Reduction>().unwrap(), &reduction);
            // Whatever was asked for, counts never grow and special tokens never go.
            let grid = [7, 7];
            let host =
                Host { depth: 12, special: 1, class_token: true, width: 64, heads: 1, grid, aux_head: false, weights: None };
            if reduction.check(&host).is_ok() {
                let counts = reduction.token_counts(50, &host);
                prop_assert!(counts.windows(2).all(|w| w[1] <= w[0] && w[1] >= 1), "{} {:?}", printed, counts);
            }
        }
    }
}
