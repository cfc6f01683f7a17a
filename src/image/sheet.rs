//! Contact sheets with captions.

use super::{Picture, font};
use crate::{Error, Result};

/// Columns from one character to the next at scale 1.
const ADVANCE: usize = font::COLUMNS + 1;
/// Rows from one line to the next at scale 1.
const LINE: usize = font::ROWS + 1;

/// Height and width of `text` as [`label`] writes it at `scale`.
pub fn text_size(text: &str, scale: usize) -> [usize; 2] {
    let columns = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
    let rows = text.lines().count();
    [(rows * LINE).saturating_sub(1), (columns * ADVANCE).saturating_sub(1)]
        .map(|side| side.saturating_mul(scale))
}

/// Writes `text` into the picture, its upper left corner in column `x` and row `y`, each dot of the 5x7 letters
/// `scale` pixels wide. What does not fit is cut off; a character without a glyph becomes a frame.
pub fn label(picture: &mut Picture, x: usize, y: usize, text: &str, scale: usize, colour: [u8; 3]) {
    let (height, width) = (picture.height(), picture.width());
    for (line, characters) in text.lines().enumerate() {
        for (position, character) in characters.chars().enumerate() {
            let (top, left) = (line * LINE, position * ADVANCE);
            // Rows and columns beyond the picture are not visited, whatever the scale.
            for pixel_y in
                y.saturating_add(top.saturating_mul(scale))..height.min(end(y, top + font::ROWS, scale))
            {
                for pixel_x in x.saturating_add(left.saturating_mul(scale))
                    ..width.min(end(x, left + font::COLUMNS, scale))
                {
                    if font::is_set(character, (pixel_y - y) / scale - top, (pixel_x - x) / scale - left) {
                        picture.set(pixel_y, pixel_x, colour);
                    }
                }
            }
        }
    }
}

/// The pixel behind `dots` dots that begin at `start`.
fn end(start: usize, dots: usize, scale: usize) -> usize {
    start.saturating_add(dots.saturating_mul(scale))
}

/// The picture in RGB with `text` in a band of `background` below it, at `scale`. The result is as wide as the wider of
/// the two, both centred.
///
/// # Errors
/// When the result would be too large to address.
pub fn caption(
    picture: &Picture,
    text: &str,
    scale: usize,
    colour: [u8; 3],
    background: [u8; 3],
) -> Result<Picture> {
    let [height, width] = text_size(text, scale);
    let margin = 3_usize.saturating_mul(scale);
    let band = height.saturating_add(margin.saturating_mul(2));
    let mut sheet =
        Picture::filled(picture.height().saturating_add(band), picture.width().max(width), background)?;
    let left = (sheet.width() - picture.width()) / 2;
    paste(&mut sheet, &picture.to_channels(3)?, 0, left);
    let left = (sheet.width() - width) / 2;
    label(&mut sheet, left, picture.height() + margin, text, scale, colour);
    Ok(sheet)
}

/// A contact sheet, RGB: the pictures in rows and columns, `gap` pixels of `background` between and around them. A
/// column is as wide as its widest picture, a row as high as its highest; each picture is centred in its cell. Rows may
/// differ in length.
///
/// # Errors
/// When there is no picture or the sheet would be too large to address.
pub fn grid(rows: &[Vec<Picture>], gap: usize, background: [u8; 3]) -> Result<Picture> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    if columns == 0 {
        return Err(Error::argument("grid", "no pictures given; give at least one"));
    }
    let heights: Vec<usize> =
        rows.iter().map(|row| row.iter().map(Picture::height).max().unwrap_or(0)).collect();
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().filter_map(|row| row.get(column)).map(Picture::width).max().unwrap_or(0))
        .collect();
    let total =
        |sides: &[usize]| sides.iter().fold(gap, |sum, side| sum.saturating_add(*side).saturating_add(gap));
    let mut sheet = Picture::filled(total(&heights), total(&widths), background)?;
    let mut top = gap;
    for (row, height) in rows.iter().zip(&heights) {
        let mut left = gap;
        for (picture, width) in row.iter().zip(&widths) {
            let (y, x) = (top + (height - picture.height()) / 2, left + (width - picture.width()) / 2);
            paste(&mut sheet, &picture.to_channels(3)?, y, x);
            left += width + gap;
        }
        top += height + gap;
    }
    Ok(sheet)
}

/// Copies an RGB picture into an RGB sheet that has room for it.
fn paste(sheet: &mut Picture, picture: &Picture, top: usize, left: usize) {
    let (pitch, length) = (sheet.width() * 3, picture.width() * 3);
    for (row, source) in picture.data().chunks_exact(length).enumerate() {
        let at = (top + row) * pitch + left * 3;
        sheet.data_mut()[at..at + length].copy_from_slice(source);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHITE: [u8; 3] = [255; 3];

    fn rows_of(picture: &Picture) -> Vec<String> {
        let pixel = |y, x| if picture.pixel(y, x)[0] > 127 { '#' } else { '.' };
        (0..picture.height()).map(|y| (0..picture.width()).map(|x| pixel(y, x)).collect()).collect()
    }

    #[test]
    fn letters_are_written_where_asked() {
        let mut picture = Picture::filled(9, 13, [0; 3]).unwrap();
        label(&mut picture, 1, 1, "T1", 1, WHITE);
        let expected = [
            ".............",
            ".#####...#...",
            "...#....##...",
            "...#.....#...",
            "...#.....#...",
            "...#.....#...",
            "...#.....#...",
            "...#....###..",
            ".............",
        ];
        assert_eq!(rows_of(&picture), expected);
        assert_eq!(text_size("T1", 1), [9, 11]);
        assert_eq!(text_size("ab\nc", 2), [38, 22]);
        assert_eq!(text_size("", 3), [0, 0]);
    }

    #[test]
    fn text_is_cut_off_at_the_edges() {
        let mut picture = Picture::new(4, 4, 1, vec![0; 16]).unwrap();
        label(&mut picture, 2, 2, "L", 1, WHITE);
        assert_eq!(rows_of(&picture), ["....", "....", "..#.", "..#."]);
        label(&mut picture, usize::MAX, 0, "L", 1, WHITE);
        label(&mut picture, 0, usize::MAX - 1, "L\nL", usize::MAX, WHITE);
        label(&mut picture, 0, 0, "L", 0, WHITE);
        assert_eq!(rows_of(&picture), ["....", "....", "..#.", "..#."]);
        label(&mut picture, 0, 0, "L", usize::MAX, WHITE);
        assert_eq!(picture.data(), [255; 16]);
    }

    #[test]
    fn a_sheet_lines_pictures_up() {
        let tile =
            |height, width, value| Picture::new(height, width, 1, vec![value; height * width]).unwrap();
        let sheet = grid(&[vec![tile(1, 1, 10), tile(3, 2, 20)], vec![tile(1, 3, 30)]], 1, WHITE).unwrap();
        let reds: Vec<Vec<u8>> =
            (0..sheet.height()).map(|y| (0..sheet.width()).map(|x| sheet.pixel(y, x)[0]).collect()).collect();
        let w = 255;
        let expected = [
            vec![w, w, w, w, w, w, w, w],
            vec![w, w, w, w, w, 20, 20, w],
            vec![w, w, 10, w, w, 20, 20, w],
            vec![w, w, w, w, w, 20, 20, w],
            vec![w, w, w, w, w, w, w, w],
            vec![w, 30, 30, 30, w, w, w, w],
            vec![w, w, w, w, w, w, w, w],
        ];
        assert_eq!(reds, expected);
        assert!(grid(&[], 1, WHITE).is_err());
        assert!(grid(&[vec![]], 1, WHITE).is_err());
        assert!(grid(&[vec![tile(1, 1, 0)]], usize::MAX / 2, WHITE).is_err());
    }

    #[test]
    fn captions_go_below() {
        let picture = Picture::filled(4, 30, [9; 3]).unwrap();
        let captioned = caption(&picture, "r=8", 1, WHITE, [0; 3]).unwrap();
        assert_eq!((captioned.height(), captioned.width()), (4 + 9 + 6, 30));
        assert_eq!(captioned.pixel(3, 29), [9; 3]);
        assert!(rows_of(&captioned)[7..].iter().any(|row| row.contains('#')));
        assert_eq!(caption(&picture, "a wide text", 1, WHITE, [0; 3]).unwrap().width(), 65);
        assert!(caption(&picture, "a", usize::MAX, WHITE, [0; 3]).is_err());
    }
}
