//! What a square window sees at each of its places, over images and over feature maps (kernels/unfold.cu).

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};

use super::{
    DType, Device, DevicePointer, Element, Strided,
    borrow::Borrow,
    image::{CopyKernels, Kernel, Module, TypedKernels},
    launch::{Divisor, images_a_launch, int, item_shape, launch},
    nvtx,
    pixels::{DeviceImages, NORMALISED, Pixel, PixelType},
};
use crate::{Error, Result, backend::Window};

const MAPS: &str = "unfold";
const IMAGES: &str = "unfold_images";

/// Places that an item over images covers.
const PLACES: usize = 4;

/// `UnfoldParams` of kernels/unfold.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Params {
    x: DevicePointer,
    out: DevicePointer,
    x_strides: [i64; 2],
    out_strides: [i64; 2],
    units: Divisor,
    taps: Divisor,
    kernel: Divisor,
    places: Divisor,
    columns: Divisor,
    items: i32,
    height: i32,
    width: i32,
    stride: i32,
    padding: i32,
}

const _: () = assert!(
    size_of::<Params>() == 128
        && std::mem::offset_of!(Params, x_strides) == 16
        && std::mem::offset_of!(Params, units) == 48
        && std::mem::offset_of!(Params, items) == 108
);

// SAFETY: plain integers in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for Params {}

/// `UnfoldImagesParams` of kernels/unfold.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct ImagesParams {
    pixels: DevicePointer,
    out: DevicePointer,
    /// Image, channel, line, pixel.
    strides: [i64; 4],
    out_strides: [i64; 2],
    row: Divisor,
    taps: Divisor,
    kernel: Divisor,
    groups: Divisor,
    rows: Divisor,
    items: i32,
    columns: i32,
    height: i32,
    width: i32,
    stride: i32,
    padding: i32,
    reserved: i32,
    mean: [f32; NORMALISED],
    std: [f32; NORMALISED],
}

const _: () = assert!(
    size_of::<ImagesParams>() == 280
        && std::mem::offset_of!(ImagesParams, strides) == 16
        && std::mem::offset_of!(ImagesParams, row) == 64
        && std::mem::offset_of!(ImagesParams, items) == 124
        && std::mem::offset_of!(ImagesParams, mean) == 152
);

// SAFETY: plain integers and floats in the kernel's layout, which both sides assert.
unsafe impl DeviceRepr for ImagesParams {}

/// The kernels of kernels/unfold.cu.
#[derive(Debug)]
pub(super) struct UnfoldKernels {
    maps: CopyKernels,
    /// By pixel type.
    images: [TypedKernels; 2],
}

impl UnfoldKernels {
    pub(super) fn load(module: &Module) -> Result<Self> {
        let images = |prefix| TypedKernels::load_variant(module, prefix, "");
        Ok(Self {
            maps: CopyKernels::load(module, "fv_unfold")?,
            images: [images("fv_unfold_images_u8")?, images("fv_unfold_images_f32")?],
        })
    }

    fn images(&self, pixel: PixelType, dtype: DType) -> &Kernel {
        self.images[usize::from(pixel == PixelType::F32)].pick(dtype)
    }
}

/// The places of a window over a grid.
pub(super) fn places(op: &'static str, window: Window, grid: [usize; 2]) -> Result<[usize; 2]> {
    let Window { kernel, stride, padding } = window;
    window.over(grid).ok_or_else(|| {
        Error::argument(
            op,
            format!(
                "a window of {kernel}x{kernel}, stride {stride}, padding {padding} has no place on a grid of {}x{}; the \
                 stride must be at least 1, the padding less than the window, and the grid as large as the window less \
                 twice the padding",
                grid[0], grid[1]
            ),
        )
    })
}

/// Checks that `x` is a feature map of `grid`.
pub(super) fn check_grid(op: &'static str, x: &Strided<DevicePointer>, grid: [usize; 2]) -> Result<()> {
    if grid[0].checked_mul(grid[1]) == Some(x.shape[1]) {
        return Ok(());
    }
    let what = format!("x has shape {:?}, which is no feature map of {}x{}", x.shape, grid[0], grid[1]);
    Err(Error::argument(op, what))
}

/// What `window` sees at each of its places over `x` (B, H·W, C), a feature map of `grid`, into `out` (B, places, k·k·C), in the
/// order row, column, channel; zeros beyond the border.
///
/// # Errors
/// [`Error::Argument`] when the window finds no place, shapes do not fit, or an argument lives in another context;
/// [`Error::Launch`] when the driver refuses.
pub fn unfold<T: Element>(
    device: &Device,
    stream: &CudaStream,
    x: &Strided<CudaView<'_, T>>,
    grid: [usize; 2],
    window: Window,
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: MAPS, device, stream };
    let (x, _x) = borrow.read("x", x)?;
    let (out, _out) = borrow.write("out", out)?;
    // SAFETY: both tensors lie within their views (checked above), which live in the device's context and whose guards
    // outlive the launch; `out` is borrowed mutably, so it is not `x`.
    unsafe { unfold_raw(device, stream, T::DTYPE, &x, grid, window, &out) }
}

/// [`unfold`] over device pointers.
///
/// # Errors
/// As [`unfold`].
///
/// # Safety
/// On `stream`, until it has passed this launch: both pointers must be addresses in the device's memory at which the tensors
/// of their shapes, strides and `dtype` lie, `x` initialised; nobody else may write `x`, nor touch `out`; they must not
/// overlap.
pub unsafe fn unfold_raw(
    device: &Device,
    stream: &CudaStream,
    dtype: DType,
    x: &Strided<DevicePointer>,
    grid: [usize; 2],
    window: Window,
    out: &Strided<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(MAPS);
    device.check_stream(MAPS, stream)?;
    x.check(MAPS, "x", dtype)?;
    check_grid(MAPS, x, grid)?;
    let [rows, columns] = places(MAPS, window, grid)?;
    out.check_output(MAPS, "out", dtype)?;
    let [batch, _, channels] = x.shape;
    out.expect_shape(
        MAPS,
        "out",
        [batch, rows.saturating_mul(columns), window.taps().saturating_mul(channels)],
    )?;

    // A tap's channels begin anywhere in a row: all of them must be whole accesses.
    let tap = Strided { shape: [batch, out.shape[1], channels], ..*out };
    let access = x.access(dtype).min(tap.access(dtype));
    let units = channels * dtype.bytes() / access;
    let strides = |tensor: &Strided<DevicePointer>| {
        let units = |stride: usize| i64::try_from(stride * dtype.bytes() / access).unwrap_or(i64::MAX);
        tensor.strides.map(units)
    };
    let divisor = |what, n| Divisor::new(MAPS, what, n);
    let mut params = Params {
        x_strides: strides(x),
        out_strides: strides(out),
        units: divisor("accesses a tap", units)?,
        taps: divisor("taps", window.taps())?,
        kernel: divisor("columns of a window", window.kernel)?,
        places: divisor("places", rows * columns)?,
        columns: divisor("places a row", columns)?,
        height: int(MAPS, "rows", grid[0])?,
        width: int(MAPS, "columns", grid[1])?,
        stride: int(MAPS, "positions a step", window.stride)?,
        padding: int(MAPS, "positions beyond the border", window.padding)?,
        ..Params::zeroed()
    };
    let kernel = device.kernels().unfold.maps.pick(access);
    let items = (rows * columns).saturating_mul(window.taps()).saturating_mul(units);
    let together = images_a_launch(MAPS, items)?;
    for first in (0..batch).step_by(together) {
        let items = items * together.min(batch - first);
        params.x = x.image(first, dtype);
        params.out = out.image(first, dtype);
        params.items = int(MAPS, "accesses", items)?;
        // SAFETY: `Params` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel, item_shape(items), &params) }?;
    }
    Ok(())
}

/// What `window` sees at each of its places over images (B, channels, height, width), into `out` (B, places, channels·k·k), in the
/// order channel, row, column; zeros beyond the border. `u8` pixels become `(p/255 - mean)/std` by channel, rounded as the
/// reference rounds; `f32` pixels are taken as they are.
///
/// # Errors
/// [`Error::Argument`] when the window finds no place, `mean` and `std` are not one number a channel, 8-bit images have more than
/// 16 channels, shapes do not fit, or an argument lives in another context; [`Error::Launch`] when the driver refuses.
pub fn unfold_images<P: Pixel, T: Element>(
    device: &Device,
    stream: &CudaStream,
    images: &DeviceImages<CudaView<'_, P>>,
    window: Window,
    mean: &[f32],
    std: &[f32],
    out: &mut Strided<CudaViewMut<'_, T>>,
) -> Result<()> {
    let borrow = Borrow { op: IMAGES, device, stream };
    images.check_length(IMAGES)?;
    let (data, _pixels) = borrow.read_view("images", &images.data)?;
    let (out, _out) = borrow.write("out", out)?;
    let images = DeviceImages { data, shape: images.shape, strides: images.strides };
    // SAFETY: both lie within their views (checked above), which live in the device's context and whose guards outlive the
    // launch; `out` is borrowed mutably, so it is not the images.
    unsafe { unfold_images_raw(device, stream, P::TYPE, T::DTYPE, &images, window, mean, std, &out) }
}

/// [`unfold_images`] over device pointers.
///
/// # Errors
/// As [`unfold_images`].
///
/// # Safety
/// As [`patches_raw`](super::patch::patches_raw).
#[expect(clippy::too_many_arguments, reason = "those of the operation, and the two types that pointers lack")]
pub unsafe fn unfold_images_raw(
    device: &Device,
    stream: &CudaStream,
    pixel: PixelType,
    dtype: DType,
    images: &DeviceImages<DevicePointer>,
    window: Window,
    mean: &[f32],
    std: &[f32],
    out: &Strided<DevicePointer>,
) -> Result<()> {
    let _range = nvtx::range(IMAGES);
    device.check_stream(IMAGES, stream)?;
    images.check(IMAGES, pixel)?;
    let [batch, channels, height, width] = images.shape;
    let [rows, columns] = places(IMAGES, window, [height, width])?;
    images.check_normalisation(IMAGES, pixel, mean, std)?;
    out.check_output(IMAGES, "out", dtype)?;
    let row = channels.saturating_mul(window.taps());
    out.expect_shape(IMAGES, "out", [batch, rows.saturating_mul(columns), row])?;

    let groups = columns.div_ceil(PLACES);
    let numbers = |from: &[f32]| {
        let mut to = [0.0; NORMALISED];
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = from);
        to
    };
    let divisor = |what, n| Divisor::new(IMAGES, what, n);
    let mut params = ImagesParams {
        strides: images.strides.map(|stride| i64::try_from(stride).unwrap_or(i64::MAX)),
        out_strides: out.kernel_strides(),
        row: divisor("values a place", row)?,
        taps: divisor("taps", window.taps())?,
        kernel: divisor("columns of a window", window.kernel)?,
        groups: divisor("groups of places", groups)?,
        rows: divisor("rows of places", rows)?,
        columns: int(IMAGES, "places a row", columns)?,
        height: int(IMAGES, "lines", height)?,
        width: int(IMAGES, "pixels a line", width)?,
        stride: int(IMAGES, "pixels a step", window.stride)?,
        padding: int(IMAGES, "pixels beyond the border", window.padding)?,
        mean: numbers(mean),
        std: numbers(std),
        ..ImagesParams::zeroed()
    };
    let kernel = device.kernels().unfold.images(pixel, dtype);
    let items = rows.saturating_mul(groups).saturating_mul(row);
    let together = images_a_launch(IMAGES, items)?;
    for first in (0..batch).step_by(together) {
        let items = items * together.min(batch - first);
        params.pixels = images.data + (first * images.strides[0] * pixel.bytes()) as u64;
        params.out = out.image(first, dtype);
        params.items = int(IMAGES, "values", items)?;
        // SAFETY: `ImagesParams` is the kernel's struct; the caller vouches for the memory behind it.
        unsafe { launch(stream, kernel, item_shape(items), &params) }?;
    }
    Ok(())
}
