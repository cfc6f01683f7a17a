//! Image files.

use std::{
    fs::{self, File},
    io::{Cursor, ErrorKind, Read},
    panic::catch_unwind,
    path::Path,
};

use ::image::{
    AnimationDecoder, ColorType, ExtendedColorType, ImageDecoder, ImageEncoder, ImageError, ImageFormat,
    ImageReader, ImageResult, Limits,
    codecs::{gif::GifDecoder, png::PngDecoder, png::PngEncoder, webp::WebPDecoder},
    guess_format,
};

use super::Picture;
use crate::{Error, Result};

/// The longest side that is decoded.
const MAX_SIDE: u32 = 32_768;
/// The most bytes that are read from a file or decoded to.
const MAX_BYTES: u64 = 512 << 20;

/// Reads an image file: JPEG, PNG, WebP, GIF, BMP, TIFF, ICO, PNM, QOI or TGA.
///
/// The content decides about the format, not the name (only TGA has no signature and is known by its extension). Grey
/// pictures stay grey (1 channel), palettes are expanded, transparency is dropped as Pillow's `convert("RGB")` drops it.
/// EXIF orientation is *not* applied and colour profiles are ignored: timm does neither, and its accuracies are what ours
/// are compared to. Of a TIFF with several pages the first is read.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read; [`Error::Image`], naming the file and the remedy, when it is empty, no
/// image, damaged or cut short, animated, CMYK, of more than 8 bits per channel, narrower or lower than 2 pixels, or
/// larger than 32,768 pixels a side or 512 MiB.
pub fn load(path: impl AsRef<Path>) -> Result<Picture> {
    let path = path.as_ref();
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|source| Error::io(path, source))?;
    decode(&path.display().to_string(), &bytes)
}

/// Reads the bytes of an image file, which errors call `name`. See [`load`].
///
/// # Errors
/// As [`load`], but for reading the file.
pub fn decode(name: &str, bytes: &[u8]) -> Result<Picture> {
    let fail = |what: &str| Error::image(name, what);
    if bytes.is_empty() {
        return Err(fail("the file is empty; fetch or export the image again"));
    }
    if bytes.len() as u64 > MAX_BYTES {
        return Err(fail("the file is larger than 512 MiB; scale the image down first"));
    }
    let format = guess_format(bytes)
        .ok()
        // Every other format has a signature, so a file named `.png` that does not begin like one is no PNG.
        .or_else(|| ImageFormat::from_path(name).ok().filter(|format| *format == ImageFormat::Tga))
        .ok_or_else(|| {
            fail("not an image: the content is of no known image format; use a JPEG, PNG or WebP file")
        })?;
    // The decoders are other people's code reading anyone's bytes: if one of them does panic, a batch of thousands of
    // images loses one and not all.
    match catch_unwind(|| read(format, bytes)) {
        Ok(Ok(picture)) => Ok(picture),
        Ok(Err(what)) => Err(fail(&what)),
        Err(_) => Err(fail("the decoder failed on this file; convert it to PNG")),
    }
}

/// Why a file cannot be used, and the remedy.
type Failure = String;

fn read(format: ImageFormat, bytes: &[u8]) -> Result<Picture, Failure> {
    let explain = |error: ImageError| explain(format, &error);
    if format == ImageFormat::Jpeg {
        check_jpeg(bytes)?;
    }
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MAX_SIDE), Some(MAX_SIDE));
    limits.max_alloc = Some(MAX_BYTES);

    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits.clone());
    let decoder = reader.into_decoder().map_err(explain)?;
    let (width, height) = decoder.dimensions();
    if width < 2 || height < 2 {
        return Err(format!("{width}x{height} pixels; need at least 2x2"));
    }
    if decoder.total_bytes() > MAX_BYTES {
        return Err(too_large());
    }
    if matches!(decoder.original_color_type(), ExtendedColorType::Cmyk8 | ExtendedColorType::Cmyk16) {
        return Err(CMYK.into());
    }
    let color = decoder.color_type();
    if !matches!(color, ColorType::L8 | ColorType::La8 | ColorType::Rgb8 | ColorType::Rgba8) {
        let bits = color.bits_per_pixel() / u16::from(color.channel_count());
        return Err(format!("{bits} bits per channel; convert to 8 bits per channel"));
    }
    if is_animated(format, bytes, limits).map_err(explain)? {
        return Err("animated (more than one frame); extract one frame".into());
    }

    // At most MAX_BYTES, which a usize of 32 bits holds.
    let mut data = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut data).map_err(explain)?;
    let (channels, data) = match color {
        ColorType::L8 => (1, data),
        ColorType::La8 => (1, data.as_chunks::<2>().0.iter().map(|&[grey, _]| grey).collect()),
        ColorType::Rgba8 => (3, data.as_chunks::<4>().0.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect()),
        _ => (3, data),
    };
    Picture::new(height as usize, width as usize, channels, data).map_err(|error| error.to_string())
}

const CMYK: &str = "CMYK colours; convert to RGB";

fn too_large() -> Failure {
    format!("larger than {MAX_SIDE} pixels a side or 512 MiB decoded; scale the image down first")
}

/// Whether the file holds a second frame. The first one is decoded on the way where the format has no simpler answer.
fn is_animated(format: ImageFormat, bytes: &[u8], limits: Limits) -> ImageResult<bool> {
    let bytes = Cursor::new(bytes);
    let mut frames = match format {
        ImageFormat::Gif => {
            let mut decoder = GifDecoder::new(bytes)?;
            decoder.set_limits(limits)?;
            decoder.into_frames()
        }
        ImageFormat::Png => {
            let decoder = PngDecoder::with_limits(bytes, limits)?;
            if !decoder.is_apng()? {
                return Ok(false);
            }
            decoder.apng()?.into_frames()
        }
        ImageFormat::WebP => {
            let decoder = WebPDecoder::new(bytes)?;
            if !decoder.has_animation() {
                return Ok(false);
            }
            decoder.into_frames()
        }
        _ => return Ok(false),
    };
    frames.next().transpose()?;
    Ok(frames.next().transpose()?.is_some())
}

/// What the JPEG decoder does not tell: it fills what is missing from a truncated file with grey, and turns CMYK into
/// some RGB. Walks the markers up to the end of the image.
fn check_jpeg(bytes: &[u8]) -> Result<(), Failure> {
    let mut at = 2;
    while let Some(&[first, marker]) = bytes.get(at..).and_then(<[u8]>::first_chunk) {
        let is_frame = matches!(marker, 0xC0..=0xCF) && !matches!(marker, 0xC4 | 0xC8 | 0xCC);
        match marker {
            _ if first != 0xFF => at += 1,
            // Padding: the next byte may begin a marker.
            0xFF => at += 1,
            // A literal 0xFF in the compressed data, restarts, and other markers without content.
            0x00 | 0x01 | 0xD0..=0xD8 => at += 2,
            0xD9 => return Ok(()),
            _ => {
                let Some(segment) = bytes.get(at + 2..) else { break };
                let Some(length) = segment.first_chunk().map(|&length| u16::from_be_bytes(length)) else {
                    break;
                };
                // Length (2 bytes), bits per sample, height (2), width (2), components.
                if is_frame && let Some(&[_, _, bits, _, _, _, _, components]) = segment.first_chunk() {
                    if bits != 8 {
                        return Err(format!("{bits} bits per channel; convert to 8 bits per channel"));
                    }
                    if components == 4 {
                        return Err(CMYK.into());
                    }
                }
                at += 2 + usize::from(length);
            }
        }
    }
    Err(TRUNCATED.into())
}

const TRUNCATED: &str = "the file ends early; fetch or export the image again";

/// What a decoder's error means to the person who has the file, on one line.
fn explain(format: ImageFormat, error: &ImageError) -> Failure {
    // Decoders quote bytes of the file, which may be anything.
    let said = || error.to_string().replace(|c: char| c.is_control(), " ");
    match error {
        ImageError::Limits(_) => too_large(),
        ImageError::IoError(source) if source.kind() == ErrorKind::UnexpectedEof => TRUNCATED.into(),
        ImageError::Unsupported(_) => {
            format!("this kind of {format:?} is not supported ({}); convert to an 8-bit PNG", said())
        }
        _ => format!("damaged or cut short {format:?} ({}); fetch or export the image again", said()),
    }
}

/// Writes the picture as a PNG file, over one that is there.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written; [`Error::Image`] when a side does not fit a PNG's 32 bits.
pub fn save_png(path: impl AsRef<Path>, picture: &Picture) -> Result<()> {
    let path = path.as_ref();
    let fail = |what: String| Error::image(path.display().to_string(), what);
    let (Ok(width), Ok(height)) = (u32::try_from(picture.width()), u32::try_from(picture.height())) else {
        return Err(fail(format!("{}x{} pixels do not fit a PNG file", picture.height(), picture.width())));
    };
    let color = if picture.channels() == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    let mut file = Vec::new();
    PngEncoder::new(&mut file)
        .write_image(picture.data(), width, height, color)
        .map_err(|error| fail(format!("cannot be encoded: {error}")))?;
    fs::write(path, file).map_err(|source| Error::io(path, source))
}
