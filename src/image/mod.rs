//! Images: decoding, timm's evaluation transform, drawing.
//!
//! A picture takes three steps to become a model's input, each of them the one that timm, torchvision and Pillow take,
//! to the bit:
//! 1. [`load`] or [`decode()`] (feature `image`) turn a file into a [`Picture`];
//! 2. [`Transform::apply`] resizes it and crops its centre;
//! 3. [`batch`] puts pictures of one size into [`Images`](crate::Images), [`Transform::normalise`] also subtracts the
//!    mean and divides by the deviation.
//!
//! [`overlay`] goes the other way: it paints the tokens that a reduced model ends with over the picture it was given.

#[cfg(feature = "image")]
mod decode;
mod draw;
mod font;
mod picture;
mod resize;
mod sheet;
mod transform;

#[cfg(feature = "image")]
pub use decode::{decode, load, save_png};
pub use draw::{overlay, overlay_clusters, upscale};
pub use picture::Picture;
pub use resize::{Interpolation, resize};
pub use sheet::{caption, grid, label, text_size};
pub use transform::{Transform, batch};
