//! Which method applies to which backbone: asked before a model runs, and printed into the README.

use std::fmt::Write;

use super::{Host, Method, OwnWeights, Reduction};
use crate::{Error, Result, model::arch};

/// A model, as far as methods care whether they apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backbone {
    /// Tokens that attend to each other.
    Tokens(Host),
    /// Feature maps whose positions are mixed as a grid: AFFNet.
    Grid,
}

impl Reduction {
    /// Whether the method can run on `backbone`.
    ///
    /// ```
    /// use foveate::{Reduction, reduction::Backbone};
    /// let tome: Reduction = "tome:r=13".parse()?;
    /// let error = tome.check_on(&Backbone::Grid).unwrap_err().to_string();
    /// assert!(error.contains("no token can be dropped or merged"));
    /// assert!(Reduction::None.check_on(&Backbone::Grid).is_ok());
    /// # Ok::<(), foveate::Error>(())
    /// ```
    ///
    /// # Errors
    /// Says what does not fit.
    pub fn check_on(&self, backbone: &Backbone) -> Result<()> {
        match backbone {
            Backbone::Tokens(host) => self.check(host),
            Backbone::Grid if *self == Self::None => Ok(()),
            Backbone::Grid => Err(Error::spec(
                self.to_string(),
                "does not apply: an AFFNet mixes positions in the frequency domain of a whole grid, from which no token can be \
                 dropped or merged; use none",
            )),
        }
    }
}

/// The backbones of the table: what it calls them, and a published model of theirs.
const BACKBONES: [(&str, Option<&str>); 8] = [
    ("ViT", Some("vit_small")),
    ("DeiT", Some("deit_small")),
    ("DeiT, distilled", Some("deit_small_distilled")),
    ("DINOv2", Some("dinov2_small_reg")),
    ("CLIP's visual tower", Some("clip_vit_b16")),
    ("LV-ViT", Some("lvvit_s")),
    ("T2T-ViT", Some("t2t_vit_14")),
    ("AFFNet", None),
];

/// The methods of the table: a specification of each.
const METHODS: [&str; 8] =
    ["tome", "mctf", "evit", "dynamicvit", "svite", "svite:tokens=138,mode=mask", "mstm", "bat"];

/// What one method is on one backbone.
enum Fit {
    Applies,
    /// With weights of its own that the checkpoint must bring.
    Trained,
    /// Never, for a reason.
    Not(String),
}

fn fit(method: &Reduction, backbone: Option<&str>) -> Result<Fit> {
    let Some(name) = backbone else {
        return Ok(method
            .check_on(&Backbone::Grid)
            .map_or_else(|no| Fit::Not(no.to_string()), |()| Fit::Applies));
    };
    let config = arch::config(name)?;
    let with = |weights| method.check_on(&Backbone::Tokens(Host { weights: Some(weights), ..config.host() }));
    Ok(match (with(OwnWeights::default()), with(method.own_weights(&config.host()))) {
        (Ok(()), _) => Fit::Applies,
        (_, Ok(())) => Fit::Trained,
        (_, Err(reason)) => Fit::Not(reason.to_string()),
    })
}

/// The table of methods and backbones, in Markdown, by the checks that models are refused with.
///
/// # Errors
/// None: every name in the table is known.
pub fn matrix() -> Result<String> {
    let methods = METHODS.map(str::parse::<Reduction>).into_iter().collect::<Result<Vec<_>>>()?;
    let mut table = String::from("| |");
    for method in METHODS {
        // What the default is needs no spelling out.
        let _ = write!(table, " `{}` |", method.replace("tokens=138,", ""));
    }
    table.push_str("\n| --- |");
    table.push_str(&" --- |".repeat(METHODS.len()));
    table.push('\n');
    let mut reasons: Vec<String> = Vec::new();
    for (title, backbone) in BACKBONES {
        let _ = write!(table, "| {title} |");
        for method in &methods {
            let cell = match fit(method, backbone)? {
                Fit::Applies => "yes".to_owned(),
                Fit::Trained => "trained".to_owned(),
                Fit::Not(reason) => {
                    // The specification in front says which column it is.
                    let reason = reason.split_once(": ").map_or(reason.clone(), |(_, rest)| rest.to_owned());
                    let known = reasons.iter().position(|other| *other == reason);
                    let at = known.unwrap_or_else(|| {
                        reasons.push(reason);
                        reasons.len() - 1
                    });
                    format!("no ({})", at + 1)
                }
            };
            let _ = write!(table, " {cell} |");
        }
        table.push('\n');
    }
    table.push_str("\n`trained`: with the weights of its own that the checkpoint must bring.");
    for (at, reason) in reasons.iter().enumerate() {
        let _ = write!(table, " ({}): {reason}.", at + 1);
    }
    table.push('\n');
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `FOVEATE_BLESS=1 cargo test -p foveate --lib readme` writes it.
    #[test]
    fn the_readme_has_the_table() {
        const BEGIN: &str = "<!-- methods and backbones: printed by foveate::reduction::matrix -->\n";
        const END: &str = "<!-- end of methods and backbones -->\n";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (before, rest) = text.split_once(BEGIN).expect("the table's beginning is marked");
        let (table, after) = rest.split_once(END).expect("the table's end is marked");
        let wanted = matrix().unwrap();
        if std::env::var_os("FOVEATE_BLESS").is_some() {
            std::fs::write(path, format!("{before}{BEGIN}{wanted}{END}{after}")).unwrap();
            return;
        }
        assert_eq!(table, wanted, "run FOVEATE_BLESS=1 cargo test -p foveate --lib readme");
    }

    #[test]
    fn what_applies_is_what_the_checks_say() {
        let fit = |spec: &str, backbone| fit(&spec.parse().unwrap(), backbone).unwrap();
        assert!(matches!(fit("tome", Some("lvvit_s")), Fit::Applies));
        assert!(matches!(fit("dynamicvit", Some("lvvit_s")), Fit::Trained));
        assert!(matches!(fit("svite", Some("t2t_vit_14")), Fit::Trained));
        assert!(matches!(fit("evit", None), Fit::Not(_)));
        let Fit::Not(reason) = fit("svite:tokens=138,mode=mask", Some("lvvit_s")) else {
            panic!("it applies")
        };
        assert!(reason.contains("auxiliary head") && reason.contains("mode=gather"), "{reason}");
        // Whatever the table calls a method, it is one.
        for name in Reduction::NAMES.iter().skip(1) {
            assert!(METHODS.iter().any(|method| method.split(':').next() == Some(name)), "{name}");
        }
    }
}
