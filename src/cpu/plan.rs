//! Plans whose arrays come back to the backend, and how they are written.

use std::ops::Deref;

use super::{
    Context,
    pack::Shared,
    pool::{PlanParts, Pool},
};
use crate::TokenPlan;

/// A token plan of [`Cpu`](super::Cpu).
pub struct Plan {
    plan: TokenPlan,
    pool: Pool,
}

impl Plan {
    pub(super) fn new(plan: TokenPlan, pool: &Pool) -> Self {
        Self { plan, pool: pool.clone() }
    }
}

impl Deref for Plan {
    type Target = TokenPlan;

    fn deref(&self) -> &TokenPlan {
        &self.plan
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        self.pool.give_back_plan(self.plan.take_parts());
    }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.plan.fmt(f)
    }
}

/// The part of a plan that describes one image.
pub(super) struct Image<'a> {
    /// (M + 1).
    pub(super) offsets: &'a mut [i32],
    /// (N).
    pub(super) members: &'a mut [i32],
    /// (N).
    pub(super) weights: &'a mut [f32],
}

impl Image<'_> {
    /// Groups in order of their number, members in order of their index, from each token's group (M for dropped tokens);
    /// `weight` is asked for members of groups of several, which `share` turns into shares of their sum, equal ones where
    /// that is nothing usable.
    pub(super) fn fill(&mut self, group_of: &[u32], share: bool, weight: impl Fn(usize) -> f32) {
        let m = self.offsets.len() - 1;
        self.offsets.fill(0);
        for &group in group_of {
            if (group as usize) < m {
                self.offsets[group as usize + 1] += 1;
            }
        }
        for group in 0..m {
            self.offsets[group + 1] += self.offsets[group];
        }
        self.members.fill(-1);
        self.weights.fill(0.0);
        // The start of each group moves to its end, which is the start of the next.
        for (token, &group) in group_of.iter().enumerate() {
            if (group as usize) < m {
                let at = &mut self.offsets[group as usize];
                self.members[*at as usize] = token as i32;
                *at += 1;
            }
        }
        self.offsets.copy_within(0..m, 1);
        self.offsets[0] = 0;
        for group in 0..m {
            let range = self.offsets[group] as usize..self.offsets[group + 1] as usize;
            let (members, weights) = (&self.members[range.clone()], &mut self.weights[range]);
            // A lone token keeps its bits.
            if let (true, [only]) = (share, &mut *weights) {
                *only = 1.0;
                continue;
            }
            for (out, &member) in weights.iter_mut().zip(members) {
                *out = weight(member as usize);
            }
            if share {
                let total: f32 = weights.iter().sum();
                let usable = total.is_finite() && total > 0.0;
                let equal = 1.0 / weights.len() as f32;
                weights.iter_mut().for_each(|w| *w = if usable { *w / total } else { equal });
            }
        }
    }
}

/// The parts of a plan that is being written.
pub(super) struct Images<'a> {
    n: usize,
    m: usize,
    offsets: Shared<'a, i32>,
    members: Shared<'a, i32>,
    weights: Shared<'a, f32>,
}

impl Images<'_> {
    /// The part that describes one image.
    ///
    /// # Safety
    /// Nobody else has this image's.
    pub(super) unsafe fn part(&self, image: usize) -> Image<'_> {
        let Self { n, m, .. } = *self;
        // SAFETY: the caller's promise.
        unsafe {
            Image {
                offsets: self.offsets.part(image * (m + 1), m + 1),
                members: self.members.part(image * n, n),
                weights: self.weights.part(image * n, n),
            }
        }
    }
}

/// A plan of `[batch, n, m]` that `write` describes, image by image in whatever order.
pub(super) fn written(context: &Context, [batch, n, m]: [usize; 3], write: impl FnOnce(&Images<'_>)) -> Plan {
    let mut parts = context.pool.take_plan(batch * (m + 1), batch * n);
    let PlanParts { offsets, members, weights } = &mut parts;
    let (offsets, members, weights) = (Shared::of(offsets), Shared::of(members), Shared::of(weights));
    write(&Images { n, m, offsets, members, weights });
    let PlanParts { offsets, members, weights } = parts;
    Plan::new(TokenPlan::from_parts(batch, n, m, offsets, members, weights), &context.pool)
}

/// A plan that `write` describes image by image, each on one thread; it is told which.
pub(super) fn build(
    context: &Context,
    extents: [usize; 3],
    write: impl Fn(usize, usize, Image<'_>) + Sync,
) -> Plan {
    written(context, extents, |images| {
        context.threads.run(extents[0], |thread, image| {
            // SAFETY: each task has an image of its own.
            write(thread, image, unsafe { images.part(image) });
        });
    })
}
