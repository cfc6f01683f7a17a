//! The object every method ends in: which input tokens make up each output token, with which weights.

use crate::{Error, Result};

/// For each image of a batch, the input tokens that make up each output token, in compressed row form.
///
/// Every input token is a member of at most one output token, of none when it is dropped. The number of output tokens is
/// the same for all images of the batch. Members of a group stand in ascending order.
///
/// ```
/// use foveate::TokenPlan;
/// // Tokens 0 and 2 are averaged, token 1 stays, token 3 is dropped.
/// let plan = TokenPlan::from_groups(4, &[vec![vec![(0, 0.5), (2, 0.5)], vec![(1, 1.0)]]])?;
/// assert_eq!((plan.tokens_in(), plan.tokens_out()), (4, 2));
/// assert_eq!(plan.group_of(0), [0, 1, 0, -1]);
/// # Ok::<(), foveate::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct TokenPlan {
    batch: usize,
    tokens_in: usize,
    tokens_out: usize,
    offsets: Vec<i32>,
    members: Vec<i32>,
    weights: Vec<f32>,
}

impl TokenPlan {
    /// A plan from its arrays: `offsets` (B, M+1), `members` (B, N) and `weights` (B, N). Entries of `members` and
    /// `weights` from `offsets[M]` on belong to no group; they must be -1 and 0.
    ///
    /// # Errors
    /// When the arrays do not have these shapes, offsets descend or leave the row, or a token is a member twice.
    pub fn new(
        batch: usize,
        tokens_in: usize,
        tokens_out: usize,
        offsets: Vec<i32>,
        members: Vec<i32>,
        weights: Vec<f32>,
    ) -> Result<Self> {
        let fail = |what: String| Err(Error::argument("token plan", what));
        if batch.checked_mul(tokens_in) != Some(members.len())
            || members.len() != weights.len()
            || batch.checked_mul(tokens_out + 1) != Some(offsets.len())
        {
            return fail(format!(
                "offsets {}, members {} and weights {} do not fit batch {batch}, {tokens_in} tokens in, {tokens_out} out",
                offsets.len(),
                members.len(),
                weights.len()
            ));
        }
        if i32::try_from(tokens_in).is_err() {
            return fail(format!("{tokens_in} tokens are more than 32-bit indices address"));
        }
        let mut seen = vec![false; tokens_in];
        for image in 0..batch {
            let row = &offsets[image * (tokens_out + 1)..(image + 1) * (tokens_out + 1)];
            let in_range =
                row[0] == 0 && row.windows(2).all(|w| w[0] <= w[1]) && row[tokens_out] as usize <= tokens_in;
            if !in_range {
                return fail(format!("offsets of image {image} do not ascend from 0 to at most {tokens_in}"));
            }
            seen.fill(false);
            let used = row[tokens_out] as usize;
            for (at, &token) in members[image * tokens_in..(image + 1) * tokens_in].iter().enumerate() {
                if at >= used {
                    if token != -1 {
                        return fail(format!("image {image}: member {token} stands behind the last group"));
                    }
                    continue;
                }
                let slot = usize::try_from(token).ok().and_then(|t| seen.get_mut(t));
                match slot {
                    Some(slot) if !*slot => *slot = true,
                    Some(_) => return fail(format!("image {image}: token {token} is a member twice")),
                    None => {
                        return fail(format!("image {image}: member {token} is not a token of {tokens_in}"));
                    }
                }
            }
        }
        Ok(Self { batch, tokens_in, tokens_out, offsets, members, weights })
    }

    /// A plan from arrays that are known to be right: what [`TokenPlan::new`] checks.
    pub(crate) fn from_parts(
        batch: usize,
        tokens_in: usize,
        tokens_out: usize,
        offsets: Vec<i32>,
        members: Vec<i32>,
        weights: Vec<f32>,
    ) -> Self {
        Self { batch, tokens_in, tokens_out, offsets, members, weights }
    }

    /// Its arrays, to be used again; it is empty then.
    pub(crate) fn take_parts(&mut self) -> (Vec<i32>, Vec<i32>, Vec<f32>) {
        (self.batch, self.tokens_in, self.tokens_out) = (0, 0, 0);
        let Self { offsets, members, weights, .. } = self;
        (std::mem::take(offsets), std::mem::take(members), std::mem::take(weights))
    }

    /// A plan from nested lists: for each image, for each output token, its members and their weights.
    ///
    /// # Errors
    /// As [`TokenPlan::new`], and when the images have different numbers of output tokens.
    pub fn from_groups(tokens_in: usize, groups: &[Vec<Vec<(usize, f32)>>]) -> Result<Self> {
        let tokens_out = groups.first().map_or(0, Vec::len);
        let (mut offsets, mut members, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for (image, rows) in groups.iter().enumerate() {
            if rows.len() != tokens_out {
                return Err(Error::argument(
                    "token plan",
                    format!("image {image} has {} output tokens, image 0 has {tokens_out}", rows.len()),
                ));
            }
            let start = members.len();
            offsets.push(0);
            for row in rows {
                let at = members.len();
                members.extend(row.iter().map(|&(token, _)| i32::try_from(token).unwrap_or(-1)));
                weights.extend(row.iter().map(|&(_, weight)| weight));
                let mut order: Vec<usize> = (at..members.len()).collect();
                order.sort_by_key(|&i| members[i]);
                let sorted: Vec<_> = order.iter().map(|&i| (members[i], weights[i])).collect();
                for (i, (m, w)) in sorted.into_iter().enumerate() {
                    (members[at + i], weights[at + i]) = (m, w);
                }
                offsets.push((members.len() - start) as i32);
            }
            if members.len() - start > tokens_in {
                return Err(Error::argument(
                    "token plan",
                    format!("image {image} has more members than tokens"),
                ));
            }
            members.resize(start + tokens_in, -1);
            weights.resize(start + tokens_in, 0.0);
        }
        Self::new(groups.len(), tokens_in, tokens_out, offsets, members, weights)
    }

    /// The plan that changes nothing.
    pub fn identity(batch: usize, tokens: usize) -> Self {
        let per_image =
            |from: std::ops::Range<usize>| (0..batch).flat_map(move |_| from.clone().map(|t| t as i32));
        Self {
            batch,
            tokens_in: tokens,
            tokens_out: tokens,
            offsets: per_image(0..tokens + 1).collect(),
            members: per_image(0..tokens).collect(),
            weights: vec![1.0; batch * tokens],
        }
    }

    /// Images B.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Input tokens N of each image.
    pub fn tokens_in(&self) -> usize {
        self.tokens_in
    }

    /// Output tokens M of each image.
    pub fn tokens_out(&self) -> usize {
        self.tokens_out
    }

    /// Row starts, (B, M+1).
    pub fn offsets(&self) -> &[i32] {
        &self.offsets
    }

    /// Input token ids grouped by output token, (B, N); -1 behind the last group.
    pub fn members(&self) -> &[i32] {
        &self.members
    }

    /// The weight of each member in its output token, (B, N).
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The members of output token `token` of image `image`, and their weights.
    ///
    /// # Panics
    /// When `image` or `token` is out of range.
    pub fn group(&self, image: usize, token: usize) -> (&[i32], &[f32]) {
        let row = &self.offsets[image * (self.tokens_out + 1)..];
        let (from, to) = (row[token] as usize, row[token + 1] as usize);
        let base = image * self.tokens_in;
        (&self.members[base + from..base + to], &self.weights[base + from..base + to])
    }

    /// The output token of each input token of image `image`, -1 for dropped ones.
    ///
    /// # Panics
    /// When `image` is out of range.
    pub fn group_of(&self, image: usize) -> Vec<i32> {
        let mut group = vec![-1; self.tokens_in];
        for token in 0..self.tokens_out {
            for &member in self.group(image, token).0 {
                group[member as usize] = token as i32;
            }
        }
        group
    }

    /// The plan that does what `self` and then `next` do. Weights multiply.
    ///
    /// # Errors
    /// When `next` does not take as many images and tokens as `self` gives.
    pub fn then(&self, next: &Self) -> Result<Self> {
        if (next.batch, next.tokens_in) != (self.batch, self.tokens_out) {
            return Err(Error::argument(
                "token plan",
                format!(
                    "a plan for {} images of {} tokens cannot follow one that gives {} images of {}",
                    next.batch, next.tokens_in, self.batch, self.tokens_out
                ),
            ));
        }
        let groups: Vec<Vec<Vec<(usize, f32)>>> = (0..self.batch)
            .map(|image| {
                (0..next.tokens_out)
                    .map(|token| {
                        let (middles, outer) = next.group(image, token);
                        let mut row = Vec::new();
                        for (&middle, &w) in middles.iter().zip(outer) {
                            let (members, inner) = self.group(image, middle as usize);
                            row.extend(members.iter().zip(inner).map(|(&m, &v)| (m as usize, w * v)));
                        }
                        row
                    })
                    .collect()
            })
            .collect();
        Self::from_groups(self.tokens_in, &groups)
    }
}

/// Where the tokens of the input ended up: the composition of all plans of a forward pass.
///
/// Exact (it holds no weights), so it can be drawn, and used to spread results back over the patches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceMap {
    batch: usize,
    tokens_in: usize,
    tokens_out: usize,
    group: Vec<i32>,
}

impl SourceMap {
    /// The map before anything was reduced.
    pub fn identity(batch: usize, tokens: usize) -> Self {
        let group = (0..batch).flat_map(|_| 0..tokens as i32).collect();
        Self { batch, tokens_in: tokens, tokens_out: tokens, group }
    }

    /// Follows one more plan. A token that a plan multiplies by zero (SViTE's mask) keeps its place but stands for nothing any more:
    /// it is a dropped one.
    ///
    /// # Errors
    /// When the plan does not take as many images and tokens as the map has reached.
    pub fn apply(&mut self, plan: &TokenPlan) -> Result<()> {
        if (plan.batch(), plan.tokens_in()) != (self.batch, self.tokens_out) {
            return Err(Error::argument(
                "source map",
                format!(
                    "a plan for {} images of {} tokens cannot follow {} images of {}",
                    plan.batch(),
                    plan.tokens_in(),
                    self.batch,
                    self.tokens_out
                ),
            ));
        }
        for image in 0..self.batch {
            let mut next = plan.group_of(image);
            for token in 0..plan.tokens_out() {
                if let (&[member], &[weight]) = plan.group(image, token)
                    && weight == 0.0
                {
                    next[member as usize] = -1;
                }
            }
            for group in &mut self.group[image * self.tokens_in..(image + 1) * self.tokens_in] {
                if let Ok(at) = usize::try_from(*group) {
                    *group = next[at];
                }
            }
        }
        self.tokens_out = plan.tokens_out();
        Ok(())
    }

    /// Images B.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of the input.
    pub fn tokens_in(&self) -> usize {
        self.tokens_in
    }

    /// Tokens that are left.
    pub fn tokens_out(&self) -> usize {
        self.tokens_out
    }

    /// The final token of each input token of image `image`, -1 for dropped ones.
    ///
    /// # Panics
    /// When `image` is out of range.
    pub fn groups(&self, image: usize) -> &[i32] {
        &self.group[image * self.tokens_in..(image + 1) * self.tokens_in]
    }

    /// Spreads one row of `width` values per final token back over the input tokens of image `image`; dropped tokens
    /// get `fill`.
    ///
    /// # Errors
    /// When `rows` does not hold `width` values for each final token.
    pub fn unmerge(&self, image: usize, rows: &[f32], width: usize, fill: f32) -> Result<Vec<f32>> {
        if rows.len() != self.tokens_out * width {
            return Err(Error::argument(
                "source map",
                format!("{} values are not {} tokens of width {width}", rows.len(), self.tokens_out),
            ));
        }
        let mut spread = Vec::with_capacity(self.tokens_in * width);
        for &group in self.groups(image) {
            match usize::try_from(group) {
                Ok(at) => spread.extend_from_slice(&rows[at * width..(at + 1) * width]),
                Err(_) => spread.extend(std::iter::repeat_n(fill, width)),
            }
        }
        Ok(spread)
    }
}
