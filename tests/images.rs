//! Image files as people have them: every kind that is read, and every kind that is refused with a reason.
#![cfg(feature = "image")]

use std::{fs, io::Cursor, path::PathBuf};

use ::image::{
    DynamicImage, ExtendedColorType, Frame, GrayAlphaImage, GrayImage, ImageEncoder, ImageFormat,
    Rgb32FImage, RgbImage, RgbaImage, codecs::gif::GifEncoder, codecs::jpeg::JpegEncoder,
    codecs::png::PngEncoder,
};
use foveate::{
    Error,
    image::{Picture, decode, load, save_png},
};
use proptest::prelude::*;

/// 40 columns, 30 rows, no two neighbours equal.
fn rgb() -> RgbImage {
    RgbImage::from_fn(40, 30, |x, y| ::image::Rgb([(x * 6) as u8, (y * 8) as u8, (x * y % 251) as u8]))
}

fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    image.into().write_to(&mut file, format).unwrap();
    file.into_inner()
}

/// The one line that refuses `bytes`; it starts with the name.
fn refusal(name: &str, bytes: &[u8]) -> String {
    let error = decode(name, bytes).expect_err(name);
    assert!(matches!(error, Error::Image { .. }), "{error:?}");
    let line = error.to_string();
    assert!(line.starts_with(&format!("{name}: ")) && !line.contains('\n'), "{line}");
    line
}

/// A PNG chunk, with a correct checksum.
fn chunk(kind: [u8; 4], content: &[u8]) -> Vec<u8> {
    let body = [&kind[..], content].concat();
    let mut crc = !0_u32;
    for byte in &body {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & 0_u32.wrapping_sub(crc & 1));
        }
    }
    [&u32::try_from(content.len()).unwrap().to_be_bytes()[..], &body, &(!crc).to_be_bytes()].concat()
}

/// The PNG with `extra` chunks after its header (8 bytes of signature, 25 of IHDR).
fn with_chunks(png: &[u8], extra: &[u8]) -> Vec<u8> {
    [&png[..33], extra, &png[33..]].concat()
}

#[test]
fn lossless_formats_keep_every_pixel() {
    use ImageFormat::{Bmp, Png, Pnm, Qoi, Tga, Tiff, WebP};
    let wanted = Picture::new(30, 40, 3, rgb().into_raw()).unwrap();
    for format in [Png, Bmp, Tiff, WebP, Qoi, Pnm, Tga] {
        // The name lies where it can: the content decides. TGA alone has no signature.
        let name = if format == Tga { "photo.tga" } else { "photo.jpg" };
        assert_eq!(decode(name, &encoded(rgb(), format)).unwrap(), wanted, "{format:?}");
    }
    let icon = DynamicImage::from(rgb()).into_rgba8();
    assert_eq!(decode("photo", &encoded(icon, ImageFormat::Ico)).unwrap(), wanted);
    let jpeg = decode("photo", &encoded(rgb(), ImageFormat::Jpeg)).unwrap();
    assert_eq!((jpeg.height(), jpeg.width(), jpeg.channels()), (30, 40, 3));
    assert_eq!(decode("photo", &encoded(rgb(), ImageFormat::Gif)).unwrap().channels(), 3);
}

#[test]
fn grey_stays_grey_and_alpha_is_dropped() {
    let grey = GrayImage::from_fn(5, 4, |x, y| ::image::Luma([(x * 50 + y) as u8]));
    let wanted = Picture::new(4, 5, 1, grey.to_vec()).unwrap();
    assert_eq!(decode("grey", &encoded(grey.clone(), ImageFormat::Png)).unwrap(), wanted);
    assert_eq!(decode("grey", &encoded(grey.clone(), ImageFormat::Jpeg)).unwrap().channels(), 1);
    let with_alpha =
        GrayAlphaImage::from_fn(5, 4, |x, y| ::image::LumaA([(x * 50 + y) as u8, (x * 7) as u8]));
    assert_eq!(decode("grey", &encoded(with_alpha, ImageFormat::Png)).unwrap(), wanted);
    let clear = RgbaImage::from_fn(3, 2, |x, y| ::image::Rgba([x as u8, y as u8, 9, (x * 100) as u8]));
    let wanted = Picture::new(2, 3, 3, vec![0, 0, 9, 1, 0, 9, 2, 0, 9, 0, 1, 9, 1, 1, 9, 2, 1, 9]).unwrap();
    assert_eq!(decode("clear", &encoded(clear, ImageFormat::Png)).unwrap(), wanted);
}

#[test]
fn bits_and_palettes_are_expanded() {
    assert_eq!(
        decode("bits.pbm", b"P1 2 2 0 1 1 0").unwrap(),
        Picture::new(2, 2, 1, vec![255, 0, 0, 255]).unwrap()
    );
    assert_eq!(decode("low.pgm", b"P2 2 2 5 0 1 4 5").unwrap().data(), [0, 51, 204, 255]);

    // A 2x2 PNG of one bit per pixel, once grey and once with a palette of red and blue.
    let png = |colour_type: u8, palette: &[u8]| {
        let header = [0, 0, 0, 2, 0, 0, 0, 2, 1, colour_type, 0, 0, 0];
        // zlib, one stored block: filter byte and one byte per row.
        let rows =
            [0x78, 0x01, 0x01, 4, 0, 0xFB, 0xFF, 0, 0b0100_0000, 0, 0b1000_0000, 0x01, 0x44, 0x00, 0xC1];
        let palette = if palette.is_empty() { vec![] } else { chunk(*b"PLTE", palette) };
        let chunks = [chunk(*b"IHDR", &header), palette, chunk(*b"IDAT", &rows), chunk(*b"IEND", &[])];
        [&b"\x89PNG\r\n\x1a\n"[..], &chunks.concat()].concat()
    };
    assert_eq!(decode("bits.png", &png(0, &[])).unwrap().data(), [0, 255, 255, 0]);
    let red_blue = decode("palette.png", &png(3, &[255, 0, 0, 0, 0, 255])).unwrap();
    assert_eq!(red_blue.data(), [255, 0, 0, 0, 0, 255, 0, 0, 255, 255, 0, 0]);
}

#[test]
fn what_is_no_image_is_refused() {
    assert!(refusal("empty.png", &[]).contains("empty"));
    assert!(refusal("notes.png", b"hello, I am a text file").contains("not an image"));
    assert!(refusal("noise.bin", &[7; 64]).contains("not an image"));
    assert!(refusal("cut.png", b"\x89PNG\r\n\x1a\n").contains("fetch or export the image again"));
    // AVIF is known but not read.
    assert!(refusal("new.avif", b"\0\0\0\x1cftypavif\0\0\0\0").contains("not supported"));
}

#[test]
fn truncated_files_are_refused() {
    use ImageFormat::{Bmp, Gif, Ico, Jpeg, Png, Pnm, Qoi, Tga, Tiff, WebP};
    for format in [Png, Jpeg, WebP, Gif, Bmp, Tiff, Pnm, Qoi, Tga, Ico] {
        let file = encoded(rgb(), format);
        for length in [file.len() / 4, file.len() / 2, file.len() * 9 / 10] {
            let line = refusal("cut.tga", &file[..length]);
            assert!(line.contains("again"), "{format:?} {length} of {}: {line}", file.len());
        }
    }
}

#[test]
fn more_than_8_bits_are_refused() {
    let deep = [
        encoded(DynamicImage::new_luma16(4, 4), ImageFormat::Png),
        encoded(DynamicImage::new_rgb16(4, 4), ImageFormat::Png),
        encoded(DynamicImage::new_rgba16(4, 4), ImageFormat::Png),
        encoded(DynamicImage::new_rgb16(4, 4), ImageFormat::Tiff),
        encoded(Rgb32FImage::new(4, 4), ImageFormat::Tiff),
        b"P5 2 2 65535 01234567".to_vec(),
    ];
    for file in deep {
        assert!(refusal("deep", &file).contains("convert to 8 bits per channel"));
    }
    // Frame header of a JPEG with 12 bits per sample.
    let jpeg = b"\xFF\xD8\xFF\xC1\0\x0B\x0C\0\x10\0\x10\x01\x01\x11\0\xFF\xD9";
    assert!(refusal("deep.jpg", jpeg).contains("12 bits per channel; convert to 8"));
}

#[test]
fn cmyk_is_refused() {
    // Start of image, frame header of 16x16 with four components.
    let jpeg = b"\xFF\xD8\xFF\xC0\0\x14\x08\0\x10\0\x10\x04\x01\x11\0\x02\x11\0\x03\x11\0\x04\x11\0\xFF\xD9";
    assert!(refusal("print.jpg", jpeg).contains("CMYK"));

    // A TIFF of 2x2 pixels: header, directory of ten entries, bits per sample, 16 bytes of ink.
    let entry = |tag: u16, kind: u16, count: u32, value: u32| {
        [&tag.to_le_bytes()[..], &kind.to_le_bytes(), &count.to_le_bytes(), &value.to_le_bytes()].concat()
    };
    let entries = [
        entry(256, 4, 1, 2),   // width
        entry(257, 4, 1, 2),   // height
        entry(258, 3, 4, 134), // bits per sample, at offset 134
        entry(259, 3, 1, 1),   // not compressed
        entry(262, 3, 1, 5),   // CMYK
        entry(273, 4, 1, 142), // the strip's offset
        entry(277, 3, 1, 4),   // samples per pixel
        entry(278, 4, 1, 2),   // rows per strip
        entry(279, 4, 1, 16),  // the strip's bytes
        entry(284, 3, 1, 1),   // interleaved
    ];
    let tiff =
        [&b"II*\0\x08\0\0\0\x0A\0"[..], &entries.concat(), &[0; 4], &[8, 0, 8, 0, 8, 0, 8, 0], &[9; 16]]
            .concat();
    assert!(refusal("print.tif", &tiff).contains("convert to RGB"));
}

#[test]
fn animations_are_refused_but_single_frames_are_read() {
    let gif = |frames: usize| {
        let mut file = Vec::new();
        let mut encoder = GifEncoder::new(&mut file);
        for shade in 0..frames {
            let frame = RgbaImage::from_pixel(6, 5, ::image::Rgba([shade as u8 * 90, 10, 10, 255]));
            encoder.encode_frame(Frame::new(frame)).unwrap();
        }
        drop(encoder);
        file
    };
    assert!(refusal("cat.gif", &gif(2)).contains("extract one frame"));
    assert!(refusal("cat.gif", &gif(3)).contains("more than one frame"));
    assert_eq!(decode("cat.gif", &gif(1)).unwrap().pixel(4, 5), [0, 10, 10]);

    // An animated PNG: animation control, frame control, the image, a second frame control and the image again.
    let still = encoded(rgb(), ImageFormat::Png);
    let control = |sequence: u8| {
        let size = [0, 0, 0, 40, 0, 0, 0, 30];
        chunk(*b"fcTL", &[&[0, 0, 0, sequence], &size[..], &[0; 8], &[0, 1, 0, 10, 0, 0]].concat())
    };
    let at = still.windows(4).position(|kind| kind == b"IDAT").unwrap();
    let length = u32::from_be_bytes(still[at - 4..at].try_into().unwrap()) as usize;
    let second = chunk(*b"fdAT", &[&[0, 0, 0, 2], &still[at + 4..at + 4 + length]].concat());
    let end = chunk(*b"IEND", &[]);
    let first = with_chunks(&still, &[chunk(*b"acTL", &[0, 0, 0, 2, 0, 0, 0, 0]), control(0)].concat());
    let animated = [&first[..first.len() - end.len()], &control(1), &second, &end].concat();
    assert!(refusal("cat.png", &animated).contains("extract one frame"));
    let single = with_chunks(&still, &[chunk(*b"acTL", &[0, 0, 0, 1, 0, 0, 0, 0]), control(0)].concat());
    assert_eq!(decode("cat.png", &single).unwrap().data(), rgb().into_raw());

    // An animated WebP: the extended header with the animation flag, and two frames of the still image's data.
    let still = encoded(rgb(), ImageFormat::WebP);
    let riff = |kind: &[u8; 4], content: &[u8]| {
        [
            &kind[..],
            &u32::try_from(content.len()).unwrap().to_le_bytes(),
            content,
            &vec![0; content.len() % 2],
        ]
        .concat()
    };
    let frame =
        riff(b"ANMF", &[&[0, 0, 0, 0, 0, 0, 39, 0, 0, 29, 0, 0, 10, 0, 0, 0][..], &still[12..]].concat());
    let header = riff(b"VP8X", &[2, 0, 0, 0, 39, 0, 0, 29, 0, 0]);
    let chunks = [header, riff(b"ANIM", &[0; 6]), frame.clone(), frame].concat();
    let animated = riff(b"RIFF", &[&b"WEBP"[..], &chunks].concat());
    assert!(refusal("cat.webp", &animated).contains("extract one frame"));
}

#[test]
fn slivers_and_bombs_are_refused() {
    for (width, height) in [(1, 1), (1, 9), (9, 1)] {
        let line = refusal("dot.png", &encoded(RgbImage::new(width, height), ImageFormat::Png));
        assert!(line.contains("need at least 2x2"), "{line}");
    }
    let small = encoded(rgb(), ImageFormat::Png);
    for (width, height) in [(40_000_u32, 2_u32), (2, 40_000), (32_000, 32_000), (u32::MAX, u32::MAX), (0, 5)]
    {
        let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
        let bomb = [&small[..8], &chunk(*b"IHDR", &header), &small[33..]].concat();
        let line = refusal("bomb.png", &bomb);
        assert!(width == 0 || line.contains("512 MiB"), "{line}");
    }
    assert!(refusal("bomb.ppm", b"P6 32000 32000 255 ").contains("512 MiB"));
}

#[test]
fn damage_in_the_middle_is_one_line_or_a_picture() {
    // Checksums and codes break at every place of the file; nothing may panic or print garbage.
    for format in
        [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif, ImageFormat::Tiff]
    {
        let file =
            encoded(RgbImage::from_fn(9, 8, |x, y| ::image::Rgb([x as u8 * 20, y as u8 * 30, 5])), format);
        for at in 0..file.len() {
            let mut damaged = file.clone();
            damaged[at] ^= 0xA5;
            if decode("damaged", &damaged).is_err() {
                refusal("damaged", &damaged);
            }
        }
    }
}

/// A path of this test's own, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("foveate-{}-{name}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn pictures_are_written_and_read_back() {
    for (name, channels) in [("grey.png", 1), ("colour.png", 3)] {
        let path = Scratch::new(name);
        let picture =
            Picture::new(5, 4, channels, (0..20 * channels).map(|v| (v * 4) as u8).collect()).unwrap();
        save_png(&path.0, &picture).unwrap();
        assert_eq!(load(&path.0).unwrap(), picture);
    }
}

#[test]
fn unreadable_paths_are_named() {
    let missing = load("no/such/cat.png").unwrap_err();
    assert!(
        matches!(missing, Error::Io { .. }) && missing.to_string().starts_with("no/such/cat.png: "),
        "{missing}"
    );
    let directory = load(std::env::temp_dir()).unwrap_err();
    assert!(directory.to_string().starts_with(&*std::env::temp_dir().to_string_lossy()), "{directory}");
    let picture = Picture::filled(2, 2, [0; 3]).unwrap();
    assert!(matches!(save_png("no/such/folder/x.png", &picture), Err(Error::Io { .. })));
    let path = Scratch::new("empty.png");
    fs::write(&path.0, []).unwrap();
    assert!(load(&path.0).unwrap_err().to_string().contains("empty"));
}

#[test]
fn encoders_of_the_tests_are_sound() {
    // The files above are refused for the reason given and not because the tests write rubbish.
    let mut png = Vec::new();
    PngEncoder::new(&mut png).write_image(&[1, 2, 3, 4], 2, 2, ExtendedColorType::L8).unwrap();
    assert_eq!(decode("a", &with_chunks(&png, &chunk(*b"tEXt", b"a\0b"))).unwrap().data(), [1, 2, 3, 4]);
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, 100)
        .write_image(&[90; 64], 8, 8, ExtendedColorType::L8)
        .unwrap();
    assert_eq!(decode("a", &jpeg).unwrap().data(), [90; 64]);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(
        start in prop::sample::select(vec![
            &b""[..], b"\x89PNG\r\n\x1a\n", b"\xFF\xD8\xFF", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"qoif", b"P6 9 9 255\n",
            b"\0\0\x01\0", b"RIFF\x40\0\0\0WEBPVP8 ", b"P7\n",
        ]),
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        name in prop::sample::select(vec!["x", "x.tga"]),
    ) {
        let file = [start, &bytes].concat();
        if let Err(error) = decode(name, &file) {
            prop_assert!(!error.to_string().contains('\n'), "{}", error);
        }
    }
}
