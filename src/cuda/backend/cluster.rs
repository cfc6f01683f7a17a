//! Decoupled tokens, and windows over the grid of patches.

use super::{
    super::{
        DType,
        cluster::{ClusterPointers, Decoupling, cluster_raw, workspace_bytes},
        windows::{Windows, add_windows_raw, pool_windows_raw},
    },
    Cuda, CudaPlan, CudaTensor,
};
use crate::{Error, Result, backend::Cluster};

const OP: &str = "cluster";

impl Cuda {
    pub(super) fn cluster_tokens(&self, cluster: &Cluster<'_, CudaTensor>) -> Result<CudaPlan> {
        let (x, dtype) = self.read_stream(OP, "tokens", cluster.tokens)?;
        self.check(OP, "class scores", cluster.class_scores, DType::F32)?;
        let class_scores = cluster.class_scores.tokens(OP, "class scores")?;
        let [batch, tokens, _] = x.shape;
        let &Cluster { special, keep, inattentive, .. } = cluster;
        let decoupling = Decoupling { special, keep, inattentive };
        let plan = self.empty_plan(batch, tokens, decoupling.tokens_out(tokens)?)?;
        let workspace = self.scratch(&[workspace_bytes(batch, tokens) / 4], DType::F32)?;
        let workspace = workspace.pointer();
        let pointers = ClusterPointers { x, class_scores, decoupling, workspace, plan: plan.pointers() };
        // SAFETY: as for `Backend` (see there); the workspace is this call's own.
        unsafe { cluster_raw(self.device(), self.stream(), dtype, &pointers) }?;
        Ok(plan)
    }

    /// (B, N, C) as a grid behind special tokens.
    fn windows(
        &self,
        op: &'static str,
        x: &CudaTensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<Windows> {
        let [batch, tokens, width] = self.read_stream(op, "x", x)?.0.shape;
        let windows = Windows { batch, special, grid, width, scale };
        if windows.tokens() == tokens {
            return Ok(windows);
        }
        Err(Error::argument(
            op,
            format!(
                "{tokens} tokens of which {special} are special are no grid of {}x{} patches",
                grid[0], grid[1]
            ),
        ))
    }

    pub(super) fn pooled_windows(
        &self,
        x: &CudaTensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<CudaTensor> {
        let x = &self.stored("pool_windows", "x", x)?;
        let windows = self.windows("pool_windows", x, special, grid, scale)?;
        let [rows, columns] = windows.cells();
        let out = self.empty(&[windows.batch, rows * columns, windows.width], self.dtype())?;
        let (x, pooled) = (x.pointer(), out.pointer());
        // SAFETY: as for `Backend` (see there).
        unsafe { pool_windows_raw(self.device(), self.stream(), self.dtype(), x, windows, pooled) }?;
        Ok(out)
    }

    pub(super) fn added_windows(
        &self,
        x: CudaTensor,
        pooled: &CudaTensor,
        special: usize,
        grid: [usize; 2],
        scale: usize,
    ) -> Result<CudaTensor> {
        const OP: &str = "add_windows";
        let windows = self.windows(OP, &x, special, grid, scale)?;
        let [rows, columns] = windows.cells();
        let shape = [windows.batch, rows * columns, windows.width];
        let x = x.into_own()?;
        // Of the type of what they are added to.
        let dtype = x.dtype();
        let pooled = self.converted(OP, "pooled", pooled, dtype)?;
        self.check(OP, "pooled", &pooled, dtype)?;
        pooled.expect_shape(OP, "pooled", &shape)?;
        let pooled = pooled.pointer();
        // SAFETY: as for `Backend` (see there); `x` is nobody else's.
        unsafe { add_windows_raw(self.device(), self.stream(), dtype, x.pointer(), windows, pooled) }?;
        Ok(x)
    }
}
