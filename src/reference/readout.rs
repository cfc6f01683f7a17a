//! What a model reads out with: rows side by side, means of two, sizes behind hidden tokens.

use super::expect_shape;
use crate::{Error, Result, Tensor, tensor::elements};

pub(super) fn concat(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    const OP: &str = "concat";
    let (&[batch, _], &[_, columns]) = (left.shape(), right.shape()) else {
        let shapes = format!("shapes {:?} and {:?}, expected two axes each", left.shape(), right.shape());
        return Err(Error::argument(OP, shapes));
    };
    expect_shape(OP, "right", right, &[batch, columns])?;
    let rows = (0..batch).flat_map(|image| [left.item(image), right.item(image)].concat());
    Tensor::new(&[batch, left.width() + columns], rows.collect())
}

pub(super) fn average(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    expect_shape("average", "b", b, a.shape())?;
    let mean = a.data().iter().zip(b.data()).map(|(a, b)| f32::midpoint(*a, *b)).collect();
    Tensor::new(a.shape(), mean)
}

pub(super) fn hidden_sizes(
    sizes: Option<&Tensor>,
    [batch, tokens]: [usize; 2],
    hidden: usize,
) -> Result<Tensor> {
    const OP: &str = "hidden_sizes";
    if let Some(sizes) = sizes {
        expect_shape(OP, "sizes", sizes, &[batch, tokens])?;
    }
    let all = hidden.checked_add(tokens).filter(|&all| elements(&[batch, all]).is_some());
    let all = all.ok_or_else(|| {
        Error::argument(OP, format!("{batch} x ({hidden} + {tokens}) sizes are too many to address"))
    })?;
    let ones = vec![1.0; tokens];
    let known = |image: usize| sizes.map_or(&*ones, |sizes| sizes.item(image));
    let rows = (0..batch).flat_map(|image| [&vec![0.0; hidden], known(image)].concat());
    Tensor::new(&[batch, all], rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], values: &[f32]) -> Tensor {
        Tensor::new(shape, values.to_vec()).unwrap()
    }

    #[test]
    fn rows_stand_side_by_side() {
        let (left, right) = (tensor(&[2, 2], &[1.0, 2.0, 3.0, 4.0]), tensor(&[2, 1], &[5.0, 6.0]));
        assert_eq!(concat(&left, &right).unwrap(), tensor(&[2, 3], &[1.0, 2.0, 5.0, 3.0, 4.0, 6.0]));
        let message = concat(&left, &tensor(&[1, 2], &[0.0; 2])).unwrap_err().to_string();
        assert!(message.contains("right has shape [1, 2], expected [2, 2]"), "{message}");
        assert!(concat(&left, &tensor(&[2], &[0.0; 2])).is_err());
    }

    #[test]
    fn the_mean_of_two() {
        let (a, b) = (tensor(&[1, 2], &[1.0, -4.0]), tensor(&[1, 2], &[2.0, 4.0]));
        assert_eq!(average(&a, &b).unwrap(), tensor(&[1, 2], &[1.5, 0.0]));
        assert!(average(&a, &tensor(&[2, 1], &[0.0; 2])).is_err());
    }

    #[test]
    fn hidden_tokens_have_no_size() {
        let sizes = tensor(&[2, 2], &[1.0, 3.0, 2.0, 2.0]);
        let want = tensor(&[2, 3], &[0.0, 1.0, 3.0, 0.0, 2.0, 2.0]);
        assert_eq!(hidden_sizes(Some(&sizes), [2, 2], 1).unwrap(), want);
        assert_eq!(hidden_sizes(None, [1, 2], 2).unwrap(), tensor(&[1, 4], &[0.0, 0.0, 1.0, 1.0]));
        assert!(hidden_sizes(Some(&sizes), [2, 3], 1).is_err());
    }
}
