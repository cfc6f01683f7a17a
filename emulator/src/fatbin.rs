//! Module images: what a pointer given to `cuModuleLoadData` points to, and the PTX inside a fat binary.
//!
//! A fat binary is a header of 16 bytes (magic, version, header size, payload size) and entries of one kind and
//! architecture each: a header of 64 bytes or more, then the payload, stored or compressed. Everything in it is
//! checked against the bytes that are there; only finding out how many there are must trust the pointer.

use std::fmt;
use std::io::Read;

/// First four bytes of a fat binary.
pub const FATBIN_MAGIC: u32 = 0xba55_ed50;
/// First four bytes of the structure nvcc's host code keeps around a pointer to a fat binary.
pub const WRAPPER_MAGIC: u32 = 0x4662_43b1;
/// First four bytes of an ELF file, which a cubin is.
const ELF_MAGIC: u32 = 0x464c_457f;

/// Largest image and largest decompressed text; a size above it is a damaged header.
pub const MAX_IMAGE: u64 = 1 << 30;
/// Bytes of the file header.
const HEADER: usize = 16;
/// Bytes of an entry header up to and with the architecture.
const ENTRY: usize = 32;

/// Kind of an entry that holds PTX.
const KIND_PTX: u16 = 1;
/// Kind of an entry that holds machine code.
const KIND_ELF: u16 = 2;

/// Entry flags: LZ4 blocks (`-compress-mode=speed`).
const FLAG_LZ4: u64 = 0x2000;
/// Entry flags: a zstd frame (the default).
const FLAG_ZSTD: u64 = 0x8000;
/// Entry flags: `sm_90a`, for exactly this architecture.
const FLAG_SPECIFIC: u64 = 0x10_0000;
/// Entry flags: `sm_100f`, for this and the later ones of its family.
const FLAG_FAMILY: u64 = 0x20_0000;

/// What a module image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// A fat binary, or nvcc's wrapper around a pointer to one.
    Fatbin,
    /// Machine code alone.
    Cubin,
    /// PTX text that ends with a NUL.
    Text,
}

/// Why no PTX came out of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FatbinError {
    /// The image is a cubin, or the fat binary has nothing but machine code.
    OnlyMachineCode,
    /// There is PTX, but none that this device can run: the architectures found, and the device's.
    WrongArchitecture {
        /// As in `sm_90a`, in file order.
        found: Vec<String>,
        /// The device's, for example 80.
        device: u32,
    },
    /// The fat binary has no entry with code.
    Empty,
    /// The payload is compressed in a way that is not known here, or its data are damaged.
    Compressed(String),
    /// A size or magic number does not fit the bytes that are there.
    Malformed(String),
}

impl fmt::Display for FatbinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnlyMachineCode => write!(
                f,
                "the image holds machine code but no PTX; embed PTX too, for example with \
                 nvcc -gencode arch=compute_80,code=compute_80"
            ),
            Self::WrongArchitecture { found, device } => write!(
                f,
                "the image holds PTX for {} and the device is sm_{device}; embed PTX for it, for example with \
                 nvcc -gencode arch=compute_{device},code=compute_{device}",
                found.join(", ")
            ),
            Self::Empty => write!(f, "the fat binary holds no code"),
            Self::Compressed(what) => {
                write!(
                    f,
                    "the PTX in the fat binary cannot be decompressed: {what}; build with nvcc -no-compress"
                )
            }
            Self::Malformed(what) => write!(f, "the fat binary is damaged: {what}"),
        }
    }
}

impl std::error::Error for FatbinError {}

fn malformed<T>(what: impl Into<String>) -> Result<T, FatbinError> {
    Err(FatbinError::Malformed(what.into()))
}

/// `N` little-endian bytes at `at`; zeros where the header is too short to have them.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|field| field.try_into().ok()).unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

/// Header and payload of one entry.
struct Entry<'a> {
    kind: u16,
    compressed: u32,
    architecture: u32,
    flags: u64,
    decompressed: u64,
    payload: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Splits the first entry off `bytes`.
    fn split(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), FatbinError> {
        if bytes.len() < ENTRY {
            return malformed(format!("{} bytes are left where an entry begins", bytes.len()));
        }
        let (header, size) = (u64::from(u32_at(bytes, 4)), u64_at(bytes, 8));
        let end = header.checked_add(size).filter(|&end| end <= bytes.len() as u64);
        let Some(end) = end.filter(|_| header >= ENTRY as u64) else {
            return malformed(format!(
                "an entry of {header} + {size} bytes does not fit the {} that are left",
                bytes.len()
            ));
        };
        let (entry, rest) = bytes.split_at(end as usize);
        let (header, payload) = entry.split_at(header as usize);
        let entry = Self {
            kind: u16_at(header, 0),
            compressed: u32_at(header, 16),
            architecture: u32_at(header, 28),
            flags: u64_at(header, 40),
            decompressed: u64_at(header, 56),
            payload,
        };
        Ok((entry, rest))
    }

    /// How well it suits the device; `None` when it cannot run there.
    fn rank(&self, device: u32) -> Option<(u32, u8)> {
        let arch = self.architecture;
        if self.flags & FLAG_SPECIFIC != 0 {
            (arch == device).then_some((arch, 2))
        } else if self.flags & FLAG_FAMILY != 0 {
            (arch <= device && arch / 10 == device / 10).then_some((arch, 1))
        } else {
            (arch <= device).then_some((arch, 0))
        }
    }

    fn name(&self) -> String {
        let suffix = match self.flags & (FLAG_SPECIFIC | FLAG_FAMILY) {
            0 => "",
            FLAG_FAMILY => "f",
            _ => "a",
        };
        format!("sm_{}{suffix}", self.architecture)
    }

    fn text(&self) -> Result<String, FatbinError> {
        let method = self.flags & (FLAG_LZ4 | FLAG_ZSTD);
        if method == 0 && self.compressed == 0 {
            return Ok(ptx_text(self.payload));
        }
        let Some(data) = self.payload.get(..self.compressed as usize).filter(|data| !data.is_empty()) else {
            return malformed(format!(
                "{} compressed bytes in a payload of {}",
                self.compressed,
                self.payload.len()
            ));
        };
        if self.decompressed > MAX_IMAGE {
            return malformed(format!("a text of {} bytes", self.decompressed));
        }
        let text = match method {
            FLAG_LZ4 => lz4(data, self.decompressed as usize),
            FLAG_ZSTD => zstd(data, self.decompressed as usize),
            _ => Err(format!("unknown method, flags 0x{:x}", self.flags)),
        }
        .map_err(FatbinError::Compressed)?;
        Ok(ptx_text(&text))
    }
}

/// Reads a zstd frame of `size` decompressed bytes.
fn zstd(data: &[u8], size: usize) -> Result<Vec<u8>, String> {
    let decoder =
        ruzstd::decoding::StreamingDecoder::new(data).map_err(|error| format!("no zstd frame: {error}"))?;
    let mut out = Vec::new();
    decoder
        .take(size as u64 + 1)
        .read_to_end(&mut out)
        .map_err(|error| format!("damaged zstd frame: {error}"))?;
    if out.len() == size { Ok(out) } else { Err(format!("the zstd frame does not hold {size} bytes")) }
}

/// Reads an LZ4 block of `size` decompressed bytes: pairs of literals and a match, of which the last has no match.
fn lz4(data: &[u8], size: usize) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let mut input = data.iter().copied();
    let mut byte = |what: &str| input.next().ok_or_else(|| format!("the LZ4 block ends inside {what}"));
    while out.len() < size {
        let token = byte("a token")?;
        let literals = length(token >> 4, &mut byte)?;
        if literals > size - out.len() {
            return Err(format!("the LZ4 block holds more than {size} bytes"));
        }
        for _ in 0..literals {
            out.push(byte("literals")?);
        }
        if out.len() == size {
            break;
        }
        let distance = usize::from(u16::from_le_bytes([byte("an offset")?, byte("an offset")?]));
        let count = 4 + length(token & 15, &mut byte)?;
        if distance == 0 || distance > out.len() || count > size - out.len() {
            return Err("a match of the LZ4 block lies outside the text".to_owned());
        }
        // Source and destination may overlap: a repeated pattern.
        for _ in 0..count {
            out.push(out[out.len() - distance]);
        }
    }
    Ok(out)
}

/// A length of LZ4: four bits, and bytes added while they are 255.
fn length(bits: u8, byte: &mut impl FnMut(&str) -> Result<u8, String>) -> Result<usize, String> {
    let mut length = usize::from(bits);
    if bits == 15 {
        loop {
            let more = byte("a length")?;
            length += usize::from(more);
            if more < 255 {
                break;
            }
        }
    }
    Ok(length)
}

/// Text up to the first NUL; comments and strings may hold any bytes.
pub fn ptx_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// The PTX of a fat binary that suits a device of architecture `sm` (80 for `sm_80`) best: the highest that is not above it.
///
/// # Errors
///
/// When there is no such PTX, and when the bytes are not what a fat binary looks like.
pub fn select_ptx(fatbin: &[u8], sm: u32) -> Result<String, FatbinError> {
    if fatbin.len() < HEADER {
        return malformed(format!("{} bytes are fewer than its header has", fatbin.len()));
    }
    let total = total_size(fatbin)?;
    let Some(image) = fatbin.get(..total) else {
        return malformed(format!("it should have {total} bytes and has {}", fatbin.len()));
    };
    let mut rest = &image[usize::from(u16_at(fatbin, 6))..];
    let mut best: Option<((u32, u8), Entry<'_>)> = None;
    let mut found = Vec::new();
    let mut machine_code = false;
    while !rest.is_empty() {
        let (entry, after) = Entry::split(rest)?;
        rest = after;
        match entry.kind {
            KIND_PTX => {
                found.push(entry.name());
                if let Some(rank) = entry.rank(sm)
                    && best.as_ref().is_none_or(|(other, _)| rank > *other)
                {
                    best = Some((rank, entry));
                }
            }
            KIND_ELF => machine_code = true,
            _ => {}
        }
    }
    match best {
        Some((_, entry)) => entry.text(),
        None if !found.is_empty() => Err(FatbinError::WrongArchitecture { found, device: sm }),
        None if machine_code => Err(FatbinError::OnlyMachineCode),
        None => Err(FatbinError::Empty),
    }
}

/// Header and payload together, from the first [`HEADER`] bytes.
fn total_size(header: &[u8]) -> Result<usize, FatbinError> {
    let magic = u32_at(header, 0);
    if magic != FATBIN_MAGIC {
        return malformed(format!("its magic number is 0x{magic:08x}"));
    }
    let (header_size, payload) = (u64::from(u16_at(header, 6)), u64_at(header, 8));
    match header_size.checked_add(payload) {
        Some(total) if header_size >= HEADER as u64 && total <= MAX_IMAGE => Ok(total as usize),
        _ => malformed(format!("a header of {header_size} and a payload of {payload} bytes")),
    }
}

/// The first four bytes; a text shorter than that is followed by zeros here, and nothing after its NUL is read.
///
/// # Safety
///
/// `image` must point to at least four readable bytes, or to fewer of which one is zero.
unsafe fn magic(image: *const u8) -> u32 {
    let mut bytes = [0; 4];
    for (index, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: the bytes before this one were not zero, so the caller's promise covers it.
        *byte = unsafe { image.add(index).read() };
        if *byte == 0 {
            break;
        }
    }
    u32::from_le_bytes(bytes)
}

/// What `image` points to, from its first four bytes.
///
/// # Safety
///
/// `image` must point to a module image: a fat binary, its wrapper, a cubin or text that ends with a NUL.
pub unsafe fn image_kind(image: *const u8) -> ImageKind {
    // SAFETY: each of the four kinds has four bytes or ends with a NUL before.
    match unsafe { magic(image) } {
        FATBIN_MAGIC | WRAPPER_MAGIC => ImageKind::Fatbin,
        ELF_MAGIC => ImageKind::Cubin,
        _ => ImageKind::Text,
    }
}

/// Follows the wrapper of nvcc's host code to the fat binary; any other pointer comes back as it is.
///
/// # Safety
///
/// As for [`image_kind`]; a wrapper's pointer must point to a fat binary.
pub unsafe fn unwrap_image(image: *const u8) -> *const u8 {
    // SAFETY: the caller's promise is the one asked for.
    if unsafe { magic(image) } == WRAPPER_MAGIC {
        // SAFETY: a wrapper has a magic number, a version and, at byte 8, the pointer; its alignment is not known.
        unsafe { image.add(8).cast::<*const u8>().read_unaligned() }
    } else {
        image
    }
}

/// How many bytes `image` has: by its header (fat binary), or up to its NUL (text). Follow a wrapper first.
///
/// # Errors
///
/// When the size is absurd, or the kind has none that can be read (cubin).
///
/// # Safety
///
/// As for [`image_kind`].
pub unsafe fn image_len(image: *const u8) -> Result<usize, FatbinError> {
    // SAFETY: the caller's promise is the one asked for.
    match unsafe { image_kind(image) } {
        ImageKind::Fatbin => {
            // SAFETY: a fat binary has a header of this size.
            total_size(unsafe { std::slice::from_raw_parts(image, HEADER) })
        }
        ImageKind::Cubin => Err(FatbinError::OnlyMachineCode),
        ImageKind::Text => (0..MAX_IMAGE as usize)
            // SAFETY: no byte before this one was the NUL that ends the text.
            .find(|&index| unsafe { image.add(index).read() } == 0)
            .map_or_else(|| malformed("a text that does not end"), Ok),
    }
}

/// The PTX in a module image for a device of architecture `sm`.
///
/// # Errors
///
/// As [`select_ptx`], and for null pointers and cubins.
///
/// # Safety
///
/// `image` must be null or point to a module image of which every byte can be read: as many as a fat binary's header
/// says, or a text up to its NUL.
pub unsafe fn ptx_from_image(image: *const u8, sm: u32) -> Result<String, FatbinError> {
    if image.is_null() {
        return malformed("a null pointer");
    }
    // SAFETY: not null, so a module image by the caller's promise.
    let image = unsafe { unwrap_image(image) };
    if image.is_null() {
        return malformed("a wrapper around a null pointer");
    }
    // SAFETY: as above; the pointer in a wrapper is one to a fat binary.
    let (kind, length) = unsafe { (image_kind(image), image_len(image)?) };
    // SAFETY: the image has this many bytes by the caller's promise, and nobody writes to it meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts(image, length) };
    if kind == ImageKind::Fatbin { select_ptx(bytes, sm) } else { Ok(ptx_text(bytes)) }
}
