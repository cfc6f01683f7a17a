//! The picture of a reduction: which patches ended up in which token.

use std::collections::BTreeMap;

use super::{Picture, picture::luma};
use crate::{Error, Result};

/// What is known of the patches of one token.
#[derive(Default)]
struct Group {
    patches: usize,
    pixels: u64,
    sums: [u64; 3],
}

impl Group {
    /// The mean colour, halves up.
    fn mean(&self) -> [u8; 3] {
        // A mean of bytes is a byte.
        self.sums.map(|sum| ((sum + self.pixels / 2) / self.pixels) as u8)
    }
}

/// The picture as a reduced model sees it at the end, RGB, in the manner of the figures of the `ToMe` paper.
///
/// `grid` is the model's (rows, columns) of patches; `groups` names, row by row, the final token that each patch is part
/// of, any negative number standing for a dropped patch. Every token's patches are filled with their mean colour, a token
/// of several patches is outlined in a colour that follows from its number alone (neighbouring numbers get distant hues),
/// a token of one patch in a darker tone of its own, and dropped patches are dark and hatched.
///
/// Lines take about a twelfth of a patch on each side, nothing below 4 pixels: [`upscale`] small inputs first.
///
/// # Errors
/// When the grid is empty, does not divide the picture evenly, or has another number of patches than `groups`.
///
/// ```
/// use foveate::image::{Picture, overlay, upscale};
///
/// let picture = upscale(&Picture::filled(2, 2, [90, 120, 150])?, 8)?;
/// let merged = overlay(&picture, [2, 2], &[0, 0, 1, -1])?;
/// assert_eq!(merged.pixel(3, 3), [90, 120, 150]);
/// # Ok::<(), foveate::Error>(())
/// ```
pub fn overlay(picture: &Picture, grid: [usize; 2], groups: &[i32]) -> Result<Picture> {
    overlay_clusters(picture, grid, groups, &[])
}

/// [`overlay`], with the outlines of tokens that are clusters (`clustered` by number; those past its end are none) dashed.
///
/// # Errors
/// As [`overlay`].
pub fn overlay_clusters(
    picture: &Picture,
    grid: [usize; 2],
    groups: &[i32],
    clustered: &[bool],
) -> Result<Picture> {
    let fail = |what: String| Err(Error::argument("overlay", what));
    let ([rows, columns], [height, width]) = (grid, [picture.height(), picture.width()]);
    if rows == 0 || columns == 0 || height % rows != 0 || width % columns != 0 {
        return fail(format!(
            "a picture of {height}x{width} pixels does not split into {rows}x{columns} equal patches"
        ));
    }
    if rows * columns != groups.len() {
        return fail(format!("{rows}x{columns} patches, but {} groups given", groups.len()));
    }
    let source = picture.to_channels(3)?;
    let patch = [height / rows, width / columns];
    let group_at = |y: usize, x: usize| groups[y / patch[0] * columns + x / patch[1]];

    let mut tokens: BTreeMap<i32, Group> = BTreeMap::new();
    for &group in groups {
        tokens.entry(group).or_default().patches += 1;
    }
    for y in 0..height {
        for x in 0..width {
            let token = tokens.entry(group_at(y, x)).or_default();
            token.pixels += 1;
            for (sum, &value) in token.sums.iter_mut().zip(source.pixel(y, x)) {
                *sum += u64::from(value);
            }
        }
    }
    // Fill and outline per token.
    let colours: BTreeMap<i32, [[u8; 3]; 2]> = tokens
        .iter()
        .map(|(&group, token)| {
            let mean = token.mean();
            let outline =
                if token.patches > 1 { hue(group) } else { mean.map(|v| (u16::from(v) * 3 / 4) as u8) };
            (group, [mean, outline])
        })
        .collect();

    let line = if patch[0].min(patch[1]) < 4 { 0 } else { patch[0].min(patch[1]).div_ceil(12).min(4) };
    let mut result = source.clone();
    for y in 0..height {
        for x in 0..width {
            let group = group_at(y, x);
            let colour = if group < 0 {
                hatch(&source, y, x, patch)
            } else {
                let [fill, mut outline] = colours[&group];
                let is_cluster = usize::try_from(group).is_ok_and(|at| clustered.get(at) == Some(&true));
                // Dashes of a quarter of a patch, along both axes.
                let dash = |position: usize, side: usize| position * 4 / side.max(1);
                if is_cluster && (dash(y, patch[0]) + dash(x, patch[1])) % 2 == 1 {
                    outline = outline.map(|v| v / 4);
                }
                if on_boundary([y, x], [height, width], patch, line, |y, x| group_at(y, x) != group) {
                    outline
                } else {
                    fill
                }
            };
            result.set(y, x, colour);
        }
    }
    Ok(result)
}

/// Whether a pixel of another group lies within `line` pixels of (y, x), diagonals included. Only the patch's own and
/// the eight around it can be that near.
fn on_boundary(
    [y, x]: [usize; 2],
    [height, width]: [usize; 2],
    patch: [usize; 2],
    line: usize,
    differs: impl Fn(usize, usize) -> bool,
) -> bool {
    let inner = |position: usize, patch: usize| (line..patch - line.min(patch)).contains(&(position % patch));
    if inner(y, patch[0]) && inner(x, patch[1]) {
        return false;
    }
    let near = |position: usize, side: usize| {
        [position.saturating_sub(line), position, (position + line).min(side - 1)]
    };
    near(y, height).into_iter().any(|y| near(x, width).into_iter().any(|x| differs(y, x)))
}

/// The pixel of a dropped patch: the original in dark grey under diagonal stripes that run through from patch to patch.
fn hatch(source: &Picture, y: usize, x: usize, patch: [usize; 2]) -> [u8; 3] {
    let &[r, g, b] = source.pixel(y, x) else { unreachable!("the source is RGB") };
    let grey = luma([r, g, b]) / 5 + 28;
    let period = (patch[0].min(patch[1]) / 2).clamp(2, 12);
    let stripe = (x + y) % period < period.div_ceil(4);
    [if stripe { grey + 40 } else { grey }; 3]
}

/// A bright colour for a number; the golden ratio keeps the hues of neighbouring numbers far apart.
fn hue(number: i32) -> [u8; 3] {
    let sector = (f64::from(number) * 0.618_033_988_749_895).rem_euclid(1.0) * 6.0;
    // One channel is full, one at the floor, one between them, in turns around the colour wheel.
    [0.0, 4.0, 2.0].map(|offset: f64| {
        let level = (((sector + offset) % 6.0 - 3.0).abs() - 1.0).clamp(0.0, 1.0);
        (60.0 + 195.0 * level) as u8
    })
}

/// The picture with every pixel a square of `factor` by `factor` pixels.
///
/// # Errors
/// When `factor` is 0 or the result would be too large to address.
pub fn upscale(picture: &Picture, factor: usize) -> Result<Picture> {
    let [height, width] = [picture.height(), picture.width()].map(|side| side.checked_mul(factor));
    let channels = picture.channels();
    let bytes = height.zip(width).and_then(|(h, w)| crate::tensor::elements(&[h, w, channels]));
    let (Some(height), Some(width), Some(bytes), 1..) = (height, width, bytes, factor) else {
        return Err(Error::argument("upscale", format!("a factor of {factor}; use a small positive number")));
    };
    let mut data = Vec::with_capacity(bytes);
    for row in picture.data().chunks_exact(picture.width() * channels) {
        let start = data.len();
        data.extend(row.chunks_exact(channels).flat_map(|pixel| pixel.repeat(factor)));
        let end = data.len();
        for _ in 1..factor {
            data.extend_from_within(start..end);
        }
    }
    Picture::new(height, width, channels, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_take_their_tokens_mean() {
        // 1x4 patches of 4x4 pixels; tokens 5 (two apart), 2 and 2.
        let values = [10, 100, 30, 101];
        let data = (0..64).map(|at| values[at % 16 / 4]).collect();
        let picture = Picture::new(4, 16, 1, data).unwrap();
        let drawn = overlay(&picture, [1, 4], &[5, 2, 5, 2]).unwrap();
        assert_eq!((drawn.height(), drawn.width(), drawn.channels()), (4, 16, 3));
        let inside = [1, 5, 9, 13].map(|x| drawn.pixel(1, x)[0]);
        assert_eq!(inside, [20, 101, 20, 101]);
        // Lines are one pixel on each side of a boundary, in the token's colour, and absent at the picture's edge.
        assert_eq!(drawn.pixel(0, 3), hue(5));
        assert_eq!(drawn.pixel(0, 4), hue(2));
        assert_eq!(drawn.pixel(0, 0), [20; 3]);
        assert_ne!(hue(5), hue(2));
    }

    #[test]
    fn outlines_of_clusters_are_dashed() {
        let picture = Picture::filled(16, 32, [90; 3]).unwrap();
        let groups = [0, 1, 0, 1];
        let merged = overlay(&picture, [2, 2], &groups).unwrap();
        let drawn = overlay_clusters(&picture, [2, 2], &groups, &[false, true]).unwrap();
        assert_eq!(drawn.pixel(3, 15), merged.pixel(3, 15), "token 0 is merged");
        // Along the boundary the cluster's outline changes four times a patch.
        let line: Vec<bool> = (0..16).map(|y| drawn.pixel(y, 16) == hue(1)).collect();
        assert_eq!(line.iter().filter(|&&bright| bright).count(), 8, "{line:?}");
        let dark = hue(1).map(|v| v / 4);
        assert!((0..16).all(|y| [&hue(1)[..], &dark[..]].contains(&drawn.pixel(y, 16))));
        assert_eq!(overlay_clusters(&picture, [2, 2], &groups, &[]).unwrap().data(), merged.data());
    }

    #[test]
    fn lines_close_at_inner_corners() {
        let picture = Picture::filled(8, 8, [200; 3]).unwrap();
        let drawn = overlay(&picture, [2, 2], &[0, 0, 0, 1]).unwrap();
        // Patch 0 touches patch 3 at one corner only.
        assert_eq!(drawn.pixel(3, 3), hue(0));
        assert_eq!(drawn.pixel(2, 2), [200; 3]);
        // A token of one patch is outlined in its own colour, darker.
        assert_eq!(drawn.pixel(4, 4), [150; 3]);
    }

    #[test]
    fn dropped_patches_are_dark_and_hatched() {
        let picture = Picture::filled(8, 16, [250, 250, 0]).unwrap();
        let drawn = overlay(&picture, [1, 2], &[0, -7]).unwrap();
        let mut seen: Vec<[u8; 3]> = (8..16).map(|x| drawn.pixel(4, x).try_into().unwrap()).collect();
        assert!(seen.iter().all(|&[r, g, b]| r == g && g == b && r < 128), "{seen:?}");
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 2);
    }

    #[test]
    fn tiny_patches_have_no_lines() {
        let picture = Picture::new(2, 4, 1, vec![8; 8]).unwrap();
        assert_eq!(overlay(&picture, [1, 2], &[0, 1]).unwrap().data(), [8; 24]);
    }

    #[test]
    fn impossible_grids_are_errors() {
        let picture = Picture::filled(6, 6, [0; 3]).unwrap();
        for (grid, groups) in
            [([0, 2], 0), ([2, 0], 0), ([4, 2], 8), ([2, 5], 10), ([2, 2], 3), ([2, 2], 5), ([12, 12], 144)]
        {
            assert!(overlay(&picture, grid, &vec![0; groups]).is_err(), "{grid:?} {groups}");
        }
    }

    #[test]
    fn upscaling_repeats_pixels() {
        let picture = Picture::new(1, 2, 3, vec![1, 2, 3, 4, 5, 6]).unwrap();
        let row = [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6];
        assert_eq!(upscale(&picture, 2).unwrap().data(), [row, row].concat());
        assert_eq!(upscale(&picture, 1).unwrap(), picture);
        assert!(upscale(&picture, 0).is_err());
        assert!(upscale(&picture, usize::MAX).is_err());
    }
}
