//! Images to patch rows, and patch tokens to the sequence of the first block (kernels/patch.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{Kernel, Module, TypedKernels},
    launch::{Divisor, images_a_launch, int, item_shape, launch},
    nvtx,
    strided::{WIDE_BYTES, check_pointer, is_wide},
};
use crate::{Error, Result};

use super::pixels::NORMALISED;
pub use super::pixels::{DeviceImages, Pixel, PixelType};

const PATCHES: &str = "patches";
const EMBED: &str = "embed";

/// Images that an item of the embedding covers.
const TOGETHER: usize = 4;

/// `PatchParams` of kernels/patch.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct PatchParams {
    pixels: DevicePointer,
    out: DevicePointer,
    /// Image, channel, line, pixel.
    strides: [i64; 4],
    out_strides: [i64; 2],
    chunks: Divisor,
    a_line: Divisor,
    lines: Divisor,
    groups: Divisor,
    rows: Divisor,
    items: i32,
    columns: i32,
    patch_width: i32,
    plane: i32,
    reserved: i32,
    mean: [f32; NORMALISED],
    std: [f32; NORMALISED],
}

const _: () = assert!(
    size_of::<PatchParams>() == 272
        && std::mem::offset_of!(PatchParams, strides) == 16
        && std::mem::offset_of!(PatchParams, chunks) == 64
        && std::mem::offset_of!(PatchParams, items) == 124
        && std::mem::offset_of!(PatchParams, mean) == 144
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for PatchParams {}

/// `EmbedParams` of kernels/patch.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct EmbedParams {
    patches: DevicePointer,
    prefix: DevicePointer,
    position: DevicePointer,
    out: DevicePointer,
    patches_strides: [i64; 2],
    out_strides: [i64; 2],
    units: Divisor,
    tokens: Divisor,
    items: i32,
    images: i32,
    special: i32,
    width: i32,
}

const _: () = assert!(
    size_of::<EmbedParams>() == 104
        && std::mem::offset_of!(EmbedParams, patches_strides) == 32
        && std::mem::offset_of!(EmbedParams, units) == 64
        && std::mem::offset_of!(EmbedParams, items) == 88
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for EmbedParams {}

/// How a kernel reads pixels and writes values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    /// Place in the kernel table.
    at: usize,
    /// Values of a store.
    count: usize,
    /// Channels of a load.
    channels: usize,
}

impl Access {
    /// Neighbouring patches that an item covers.
    const fn patches(self) -> usize {
        if self.count <= 2 { 8 } else { 4 }
    }
}

/// The kernels of kernels/patch.cu.
#[derive(Debug)]
pub(super) struct PatchKernels {
    /// By pixel type, then planes, pairs of planes, interleaved, pairs of interleaved, single.
    patches: [[TypedKernels; 5]; 2],
    /// With 16-byte accesses, with narrow ones.
    embed: [TypedKernels; 2],
}

impl PatchKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let variants = |prefix: &str| -> Result<[TypedKernels; 5]> {
            let load = |suffix| TypedKernels::load_variant(module, prefix, suffix);
            Ok([load("_planes")?, load("_planes_pair")?, load("_rgb")?, load("_rgb_pair")?, load("_single")?])
        };
        Ok(Self {
            patches: [variants("fv_patches_u8")?, variants("fv_patches_f32")?],
            embed: TypedKernels::wide_and_narrow(module, "fv_embed", "")?,
        })
    }

    fn patches(&self, pixel: PixelType, access: Access, dtype: DType) -> &Kernel {
        self.patches[usize::from(pixel == PixelType::F32)][access.at].pick(dtype)
    }
}

/// The widest accesses that images, patches and output allow.
fn access(
    images: &DeviceImages<DevicePointer>,
    pixel: PixelType,
    patch_width: usize,
    out: &Strided<DevicePointer>,
    dtype: DType,
) -> Access {
    let [_, channels, _, _] = images.shape;
    let [_, channel_step, _, pixel_step] = images.strides;
    let wide = WIDE_BYTES / dtype.bytes();
    let candidates = [(0, wide, 1), (1, 2, 1), (2, wide, 3), (3, 2, 3)];
    let fits = |&(_, count, together): &(usize, usize, usize)| {
        let order = if together == 1 {
            pixel_step == 1
        } else {
            channels == together && pixel_step == together && channel_step == 1
        };
        order
            && patch_width.is_multiple_of(count)
            && images.aligned(pixel, together, (count * pixel.bytes()).min(WIDE_BYTES))
            && out.aligned(dtype, count * dtype.bytes())
    };
    let found = candidates.into_iter().find(fits).unwrap_or((4, 1, 1));
    Access { at: found.0, count: found.1, channels: found.2 }
}

/// Cuts images (B, channels, height, width) into rows of normalised pixels, `out` (B, patches, channels · patch height ·
/// patch width), row-major over the grid. `u8` pixels become `(p/255 - mean)/std` by channel, rounded as the reference
/// rounds; `f32` pixels are taken as they are.
///
/// # Errors
/// [`Error::Argument`] when patches do not tile the images, `mean` and `std` are not one number a channel, 8-bit images
/// have more than 16 channels, shapes do not fit, or an argument lives in another context; [`Error::Launch`] when the driver
/// refuses.
pub fn patches<P: Pixel, T: Element>(
    device: &Device,
    stream: &CudaStream,
    images: &DeviceImages<CudaView<'_, P>>,
    patch: [usize; 2],
    mean: &[f32],
    std: &[f32],
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: PATCHES, device, stream };
    images.check_length(PATCHES)?;
    let (data, _pixels) = borrow.read_view("images", &images.data)?;
    let (out, _out) = borrow.write("out", out)?;
    let images = DeviceImages { data, shape: images.shape, strides: images.strides };
    // SAFETY: both lie within their views (checked above), which live in the device's context and whose guards outlive the
    // launch; `out` is borrowed mutably, so it is not the images.
    unsafe { patches_raw(device, stream, P::TYPE, T::DTYPE, &images, patch, mean, std, &out) }
}

/// [`patches`] over device pointers.
///
/// # Errors
/// As [`patches`].
///
/// # Safety
/// On `stream`, until it has passed this launch: both pointers must be addresses in the device's memory at which images and
/// `out` lie with their shapes, strides and types, the images initialised; nobody else may write the images, nor touch
/// `out`; they must not overlap.
#[expect(clippy::too_many_arguments, reason = "those of the operation, and the two types that pointers lack")]
pub unsafe fn patches_raw(
    device: &Device,
    stream: &CudaStream,
    pixel: PixelType,
    dtype: DType,
    images: &DeviceImages<DevicePointer>,
    patch: [usize; 2],
    mean: &[f32],
    std: &[f32],
    out: &Strided<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(PATCHES);
    device.check_stream(PATCHES, stream)?;
    images.check(PATCHES, pixel)?;
    let [batch, channels, height, width] = images.shape;
    let [ph, pw] = patch;
    if ph == 0 || pw == 0 || height % ph != 0 || width % pw != 0 {
        return Err(Error::argument(
            PATCHES,
            format!("{height}x{width} images do not divide into {ph}x{pw} patches"),
        ));
    }
    images.check_normalisation(PATCHES, pixel, mean, std)?;
    let (rows, columns) = (height / ph, width / pw);
    out.check_output(PATCHES, "out", dtype)?;
    // Once this holds no product below overflows.
    out.expect_shape(PATCHES, "out", [batch, rows * columns, channels.saturating_mul(ph * pw)])?;

    let access = access(images, pixel, pw, out, dtype);
    let kernel = device.kernels().patch.patches(pixel, access, dtype);
    let groups = columns.div_ceil(access.patches());
    let chunks = channels / access.channels * ph * (pw / access.count);
    let items = rows * groups * chunks;
    let divisor = |what, n| Divisor::new(PATCHES, what, n);
    let numbers = |from: &[f32]| {
        let mut to = [0.0; NORMALISED];
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = from);
        to
    };
    let mut params = PatchParams {
        strides: images.strides.map(|stride| i64::try_from(stride).unwrap_or(i64::MAX)),
        out_strides: out.kernel_strides(),
        chunks: divisor("accesses a patch", chunks)?,
        a_line: divisor("accesses a line", pw / access.count)?,
        lines: divisor("lines", ph)?,
        groups: divisor("patches", groups)?,
        rows: divisor("rows of patches", rows)?,
        columns: int(PATCHES, "patches a row", columns)?,
        patch_width: int(PATCHES, "pixels a line", pw)?,
        plane: int(PATCHES, "pixels a patch", ph * pw)?,
        mean: numbers(mean),
        std: numbers(std),
        ..PatchParams::zeroed()
    };
    let together = images_a_launch(PATCHES, items)?;
    for first in (0..batch).step_by(together) {
        let items = items * together.min(batch - first);
        params.pixels = images.data + (first * images.strides[0] * pixel.bytes()) as u64;
        params.out = out.image(first, dtype);
        params.items = int(PATCHES, "accesses", items)?;
        // SAFETY: `PatchParams` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel, item_shape(items), &params) }?;
    }
    Ok(())
}

/// Puts the special tokens `prefix` (special, C) before each image's patch tokens (B, patches, C) and adds the patches'
/// positions (patches, C): `out` is (B, special + patches, C).
///
/// # Errors
/// [`Error::Argument`] when shapes do not fit or an argument lives in another context; [`Error::Launch`] when the driver
/// refuses.
pub fn embed<T: Element>(
    device: &Device,
    stream: &CudaStream,
    patches: &Strided<CudaView<'_, T>>,
    prefix: Option<&CudaView<'_, T>>,
    position: Option<&CudaView<'_, T>>,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: EMBED, device, stream };
    let [_, count, width] = patches.shape;
    let special = special(out.shape[1], count)?;
    let (patches, _patches) = borrow.read("patches", patches)?;
    let prefix =
        prefix.map(|prefix| borrow.read_row("prefix", prefix, special.saturating_mul(width))).transpose()?;
    let position =
        position.map(|position| borrow.read_row("position", position, count.saturating_mul(width)));
    let position = position.transpose()?;
    let (out, _out) = borrow.write("out", out)?;
    let (prefix, position) = (prefix.as_ref().map(|prefix| prefix.0), position.as_ref().map(|p| p.0));
    // SAFETY: every tensor lies within its view (checked above), which lives in the device's context and whose guard
    // outlives the launch; `out` is borrowed mutably, so it is none of the others.
    unsafe { embed_raw(device, stream, T::DTYPE, &patches, prefix, position, &out) }
}

/// [`embed`] where the patch tokens are rows `special..` of `tokens` (B, special + patches, C) already: writes the special
/// tokens and adds the positions.
///
/// # Errors
/// As [`embed`].
pub fn embed_in_place<T: Element>(
    device: &Device,
    stream: &CudaStream,
    tokens: &mut Strided<CudaViewMut<'_, T>>,
    special: usize,
    prefix: Option<&CudaView<'_, T>>,
    position: Option<&CudaView<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: EMBED, device, stream };
    let [_, count, width] = tokens.shape;
    if special >= count {
        return Err(Error::argument(
            EMBED,
            format!("{special} special tokens leave none of {count} for patches"),
        ));
    }
    let prefix =
        prefix.map(|prefix| borrow.read_row("prefix", prefix, special.saturating_mul(width))).transpose()?;
    let positions = (count - special).saturating_mul(width);
    let position = position.map(|position| borrow.read_row("position", position, positions)).transpose()?;
    let (out, _out) = borrow.write("tokens", tokens)?;
    out.check_output(EMBED, "tokens", T::DTYPE)?;
    let patches = out.tokens(&(special..count), T::DTYPE);
    let (prefix, position) = (prefix.as_ref().map(|prefix| prefix.0), position.as_ref().map(|p| p.0));
    // SAFETY: as in `embed`; the patches lie where they belong in `out`, which the kernel allows.
    unsafe { embed_raw(device, stream, T::DTYPE, &patches, prefix, position, &out) }
}

fn special(tokens: usize, patches: usize) -> Result<usize> {
    tokens.checked_sub(patches).ok_or_else(|| {
        Error::argument(EMBED, format!("out has {tokens} tokens, fewer than the {patches} patches"))
    })
}

/// [`embed`] and [`embed_in_place`] over device pointers. The number of special tokens is what `out` has more than
/// `patches`.
///
/// # Errors
/// As [`embed`].
///
/// # Safety
/// On `stream`, until it has passed this launch: every pointer must be an address in the device's memory at which the
/// tensor of its shape, strides and `dtype` lies (`prefix` and `position` without gaps), initialised where it is read;
/// nobody else may write what is read, nor touch what is written; `out` must not overlap any other tensor, save that
/// `patches` may be its rows from the first patch on, with the same strides.
pub unsafe fn embed_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    patches: &Strided<DevicePointer>,
    prefix: Option<DevicePointer>,
    position: Option<DevicePointer>,
    out: &Strided<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(EMBED);
    device.check_stream(EMBED, stream)?;
    patches.check(EMBED, "patches", dtype)?;
    let [batch, count, width] = patches.shape;
    let special = special(out.shape[1], count)?;
    out.check_output(EMBED, "out", dtype)?;
    out.expect_shape(EMBED, "out", [batch, special + count, width])?;
    if prefix.is_none() && special > 0 {
        return Err(Error::argument(
            EMBED,
            format!(
                "out has {} tokens, {special} more than patches, and no prefix is given for them",
                special + count
            ),
        ));
    }
    // Of no tokens nothing is read, whatever its address.
    let prefix = prefix.filter(|_| special > 0);
    prefix.map_or(Ok(()), |prefix| check_pointer(EMBED, "prefix", prefix, dtype.bytes()))?;
    position.map_or(Ok(()), |position| check_pointer(EMBED, "position", position, dtype.bytes()))?;

    let wide =
        patches.wide(dtype) && out.wide(dtype) && [prefix, position].into_iter().flatten().all(is_wide);
    let kernel = device.kernels().patch.embed[usize::from(!wide)].pick(dtype);
    let units = if wide { width * dtype.bytes() / WIDE_BYTES } else { width };
    let items = (special + count).saturating_mul(units);
    let mut params = EmbedParams {
        prefix: prefix.unwrap_or(0),
        position: position.unwrap_or(0),
        patches_strides: patches.kernel_strides(),
        out_strides: out.kernel_strides(),
        units: Divisor::new(EMBED, "accesses a token", units)?,
        tokens: Divisor::new(EMBED, "tokens", special + count)?,
        special: int(EMBED, "special tokens", special)?,
        width: int(EMBED, "values a token", width)?,
        ..EmbedParams::zeroed()
    };
    let together = images_a_launch(EMBED, items)?.saturating_mul(TOGETHER);
    for first in (0..batch).step_by(together) {
        let images = together.min(batch - first);
        let items = items * images.div_ceil(TOGETHER);
        params.patches = patches.image(first, dtype);
        params.out = out.image(first, dtype);
        params.images = int(EMBED, "images", images)?;
        params.items = int(EMBED, "accesses", items)?;
        // SAFETY: `EmbedParams` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel, item_shape(items), &params) }?;
    }
    Ok(())
}
