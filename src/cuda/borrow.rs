//! Views become addresses: context and length are checked, and a guard keeps cudarc's bookkeeping alive over the launch.

use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop};

use super::{Device, DevicePointer, Strided};
use crate::{Error, Result, backend::Norm};

/// An operation's device and stream, while its arguments are borrowed.
#[derive(Clone, Copy)]
pub(super) struct Borrow<'a> {
    pub(super) op: &'static str,
    pub(super) device: &'a Device,
    pub(super) stream: &'a CudaStream,
}

/// An address, and what must live until the launch has been submitted.
pub(super) type Guarded<'a, P> = (P, SyncOnDrop<'a>);

/// The parameters of a LayerNorm, and their guards.
pub(super) type GuardedNorm<'a> = (Norm<DevicePointer>, [Option<SyncOnDrop<'a>>; 2]);

impl<'a> Borrow<'a> {
    /// A tensor that is read.
    pub(super) fn read<T>(
        self,
        name: &str,
        x: &'a Strided<CudaView<'_, T>>,
    ) -> Result<Guarded<'a, Strided<DevicePointer>>> {
        self.device.check_context(self.op, name, x.data.stream().context())?;
        x.check_length(self.op, name, x.data.len())?;
        let (pointer, guard) = x.data.device_ptr(self.stream);
        Ok((x.at(pointer), guard))
    }

    /// A tensor that is written.
    pub(super) fn write<T>(
        self,
        name: &str,
        x: &'a mut Strided<CudaViewMut<'_, T>>,
    ) -> Result<Guarded<'a, Strided<DevicePointer>>> {
        self.device.check_context(self.op, name, x.data.stream().context())?;
        x.check_length(self.op, name, x.data.len())?;
        let layout = Strided { data: (), shape: x.shape, strides: x.strides };
        let (pointer, guard) = x.data.device_ptr_mut(self.stream);
        Ok((layout.at(pointer), guard))
    }

    /// Memory that is read, of which the caller has checked the length.
    pub(super) fn read_view<T>(
        self,
        name: &str,
        x: &'a CudaView<'_, T>,
    ) -> Result<Guarded<'a, DevicePointer>> {
        self.device.check_context(self.op, name, x.stream().context())?;
        Ok(x.device_ptr(self.stream))
    }

    /// A row of `length` values that is read.
    pub(super) fn read_row<T>(
        self,
        name: &str,
        x: &'a CudaView<'_, T>,
        length: usize,
    ) -> Result<Guarded<'a, DevicePointer>> {
        self.device.check_context(self.op, name, x.stream().context())?;
        self.check_row(name, x.len(), length)?;
        Ok(x.device_ptr(self.stream))
    }

    /// A row of `length` values that is written.
    pub(super) fn write_row<T>(
        self,
        name: &str,
        x: &'a mut CudaViewMut<'_, T>,
        length: usize,
    ) -> Result<Guarded<'a, DevicePointer>> {
        self.device.check_context(self.op, name, x.stream().context())?;
        self.check_row(name, x.len(), length)?;
        Ok(x.device_ptr_mut(self.stream))
    }

    /// The parameters of a LayerNorm over rows of `width`.
    pub(super) fn read_norm<T>(
        self,
        norm: &'a Norm<CudaView<'_, T>>,
        width: usize,
    ) -> Result<GuardedNorm<'a>> {
        let (weight, weight_guard) = self.read_row("weight", &norm.weight, width)?;
        let bias = norm.bias.as_ref().map(|bias| self.read_row("bias", bias, width)).transpose()?;
        let (bias, bias_guard) = bias.unzip();
        Ok((Norm { weight, bias, eps: norm.eps }, [Some(weight_guard), bias_guard]))
    }

    fn check_row(self, name: &str, held: usize, expected: usize) -> Result<()> {
        if held == expected {
            return Ok(());
        }
        Err(Error::argument(self.op, format!("{name} has {held} values, expected {expected}")))
    }
}
