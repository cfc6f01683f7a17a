//! From logits to what is said about an image.

use foveate::{Tensor, backend::Backend, model::VitConfig};
use serde_json::{Value, json};

use super::{failure::Failure, options::Model};

/// One class and how likely it is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Guess {
    /// Number of the class.
    pub(crate) class: usize,
    /// Softmax probability.
    pub(crate) probability: f64,
}

impl Guess {
    /// The class's name, or its number where there are no names.
    pub(crate) fn name(&self, labels: Option<&[String]>) -> String {
        match labels.and_then(|labels| labels.get(self.class)) {
            Some(label) => label.clone(),
            None => format!("class {}", self.class),
        }
    }

    /// `class`, `label` (null without names) and `probability`.
    pub(crate) fn json(&self, labels: Option<&[String]>) -> Value {
        json!({
            "class": self.class,
            "label": labels.and_then(|labels| labels.get(self.class)),
            "probability": self.probability,
        })
    }
}

/// Whether the model's outputs are classes; the reason and the remedy if not.
pub(crate) fn require_classifier<B: Backend>(model: &Model<B>) -> Result<(), Failure> {
    let (file, config): (_, &VitConfig) = (&model.file, model.config());
    if model.is_clip() {
        return Err(Failure::Input(format!(
            "{file}: the head of a CLIP tower projects into the space it shares with texts, it does not classify; use \
             `foveate embed` for the embeddings"
        )));
    }
    if config.classes == 0 {
        return Err(Failure::Input(format!(
            "{file}: this checkpoint has no classification head; use `foveate embed` for its features"
        )));
    }
    Ok(())
}

/// Whether the model's outputs are classes.
pub(crate) fn is_classifier<B: Backend>(model: &Model<B>) -> bool {
    !model.is_clip() && model.config().classes > 0
}

/// The `top` likeliest classes of each row of logits, likeliest first; of equally likely ones the lower number first.
pub(crate) fn guesses(logits: &Tensor, top: usize) -> Vec<Vec<Guess>> {
    (0..logits.dim(0))
        .map(|image| {
            let mut all: Vec<Guess> = softmax(logits.item(image))
                .into_iter()
                .enumerate()
                .map(|(class, probability)| Guess { class, probability })
                .collect();
            // Stable, so equals stay in order.
            all.sort_by(|a, b| b.probability.total_cmp(&a.probability));
            all.truncate(top);
            all
        })
        .collect()
}

/// Softmax in double precision.
fn softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f64> = logits.iter().map(|&x| (f64::from(x) - f64::from(largest)).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first() {
        let logits = Tensor::new(&[2, 3], vec![0.0, 2.0, 0.0, 1000.0, 1000.0, -1000.0]).unwrap();
        let guesses = guesses(&logits, 2);
        let classes: Vec<Vec<usize>> = guesses.iter().map(|g| g.iter().map(|g| g.class).collect()).collect();
        assert_eq!(classes, [[1, 0], [0, 1]]);
        assert!((guesses[0][0].probability - 2_f64.exp() / (2_f64.exp() + 2.0)).abs() < 1e-12);
        assert!((guesses[1][0].probability - 0.5).abs() < 1e-12);
    }
}
