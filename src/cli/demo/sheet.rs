//! The demo's picture: every image beside its merged groups.

use foveate::image::{Picture, caption, grid, label, overlay, text_size, upscale};

use super::{Demo, Outcome, Runner};
use crate::cli::{
    failure::Failure,
    overlay::{BACKGROUND, INK, shortened},
};

/// Panels are about so wide, in pixels.
const PANEL: usize = 196;
/// Pixels between panels.
const GAP: usize = 6;
/// Panels side by side, at most.
const MOST_PANELS: usize = 16;
const RIGHT: [u8; 3] = [126, 206, 138];
const WRONG: [u8; 3] = [246, 128, 104];
const FAINT: [u8; 3] = [150, 156, 168];
/// Lines of a column's heading.
const HEADING_LINES: usize = 4;

/// Draws the sheet: two images a row where there is room.
pub(super) fn draw<B: Runner>(demo: &Demo<B>, outcomes: &[Outcome]) -> Result<Picture, Failure> {
    let factor = (PANEL / demo.config().image[1].max(1)).max(1);
    let width = demo.config().image[1] * factor;
    // The dense model keeps every patch: its panel would be the image itself.
    let reduced = &outcomes[1..];
    let side_by_side = if 2 * (reduced.len() + 1) <= MOST_PANELS { 2 } else { 1 };
    let gutter = || Picture::filled(1, 3 * GAP, BACKGROUND);

    let mut heading = Vec::new();
    for half in 0..side_by_side {
        if half > 0 {
            heading.push(gutter()?);
        }
        heading.push(head(width, &["input".to_owned(), tokens_of(&outcomes[0])])?);
        for outcome in reduced {
            heading.push(head(width, &head_lines(outcome))?);
        }
    }
    let mut rows = vec![heading];
    let order: Vec<usize> = (0..demo.items.len()).collect();
    for images in order.chunks(side_by_side) {
        let mut row = Vec::new();
        for (half, &image) in images.iter().enumerate() {
            if half > 0 {
                row.push(gutter()?);
            }
            row.extend(panels(demo, outcomes, image, factor)?);
        }
        rows.push(row);
    }
    let sheet = grid(&rows, GAP, BACKGROUND)?;
    let title = title(sheet.width())?;
    Ok(grid(&[vec![title], vec![sheet]], 0, BACKGROUND)?)
}

/// The image, then each method's groups, with what was said.
fn panels<B: Runner>(
    demo: &Demo<B>,
    outcomes: &[Outcome],
    image: usize,
    factor: usize,
) -> Result<Vec<Picture>, Failure> {
    let (item, config) = (&demo.items[image], demo.config());
    let large = upscale(&item.picture, factor)?;
    let scale = (large.width() / 98).max(1);
    let letters = large.width() / (6 * scale);
    let said = |outcome: &Outcome| {
        let guess = &outcome.guesses[image];
        let text = format!("{} {:.0}%", demo.labels[guess.class], 100.0 * guess.probability);
        (shortened(&text, letters), if guess.class == item.truth { RIGHT } else { WRONG })
    };
    let (text, colour) = said(&outcomes[0]);
    let mut panels = vec![caption(&large, &text, scale, colour, BACKGROUND)?];
    for outcome in &outcomes[1..] {
        let groups = &outcome.map.groups(image)[config.special_tokens()..];
        let (text, colour) = said(outcome);
        panels.push(caption(&overlay(&large, config.grid(), groups)?, &text, scale, colour, BACKGROUND)?);
    }
    Ok(panels)
}

fn tokens_of(outcome: &Outcome) -> String {
    let counts = &outcome.token_counts;
    match (counts.first(), counts.last()) {
        (Some(first), Some(last)) if first != last => format!("{first} to {last}"),
        (Some(first), _) => format!("{first} tokens"),
        _ => String::new(),
    }
}

/// `tome`, `r=16`, `decreasing`, and how many tokens are left.
fn head_lines(outcome: &Outcome) -> Vec<String> {
    let spec = outcome.method.to_string();
    let mut lines: Vec<String> = spec.split([':', ',']).map(|part| part.replace("schedule=", "")).collect();
    lines.truncate(HEADING_LINES - 1);
    lines.push(tokens_of(outcome));
    lines
}

/// A column's heading, as wide as the column; its last line is fainter.
fn head(width: usize, lines: &[String]) -> Result<Picture, Failure> {
    let height = text_size(&["x"; HEADING_LINES].join("\n"), 2)[0] + 8;
    let mut picture = Picture::filled(height, width, BACKGROUND)?;
    let line = text_size("x\nx", 2)[0] - text_size("x", 2)[0];
    // Lines stand on the panels below.
    let top = HEADING_LINES.saturating_sub(lines.len()) * line;
    for (at, text) in lines.iter().enumerate() {
        let colour = if at + 1 == lines.len() { FAINT } else { INK };
        let scale = if text_size(text, 2)[1] <= width { 2 } else { 1 };
        let left = width.saturating_sub(text_size(text, scale)[1]) / 2;
        label(&mut picture, left, top + at * line, text, scale, colour);
    }
    Ok(picture)
}

fn title(width: usize) -> Result<Picture, Failure> {
    let lines = [
        ("foveate demo: pictures, and the tokens that are left of them", 3, INK),
        (
            "One outline and one mean colour: patches that were merged into one token. Hatched: dropped. Below each panel: \
             the model's answer, green where it is right.",
            if width > 1800 { 2 } else { 1 },
            FAINT,
        ),
    ];
    let mut top = 4 * GAP;
    let height = lines.iter().map(|(text, scale, _)| text_size(text, *scale)[0] + 2 * GAP).sum::<usize>();
    let mut picture = Picture::filled(top + height, width, BACKGROUND)?;
    for (text, scale, colour) in lines {
        label(&mut picture, 2 * GAP, top, text, scale, colour);
        top += text_size(text, scale)[0] + 2 * GAP;
    }
    Ok(picture)
}
