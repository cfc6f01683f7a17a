//! Which blocks have read a word, where they are several.
//!
//! Words that the same blocks have read in the same order share their list: a list is its last reader and the list before.

use super::order::Segment;
use std::collections::HashMap;

/// A list of readers; 0 is the empty one.
pub(super) type List = u32;

/// The most lists of a launch; readers of words with yet other histories are forgotten.
const MOST: usize = 1 << 22;
/// How far back a reader is looked for before it is added again.
const LOOK_BACK: usize = 8;

/// All lists of a launch.
#[derive(Debug)]
pub(super) struct Readers {
    lists: Vec<(List, Segment)>,
    known: HashMap<(List, Segment), List>,
    /// The list asked for last.
    last: ((List, Segment), List),
}

impl Default for Readers {
    fn default() -> Self {
        Self { lists: vec![(0, 0)], known: HashMap::new(), last: ((0, 0), 0) }
    }
}

impl Readers {
    /// The list with one more reader.
    pub(super) fn with(&mut self, list: List, reader: Segment) -> List {
        let key = (list, reader);
        if self.last.0 == key && list != 0 {
            return self.last.1;
        }
        if self.of(list).take(LOOK_BACK).any(|other| other == reader) {
            return list;
        }
        let longer = match self.known.get(&key) {
            Some(&longer) => longer,
            None if self.lists.len() < MOST => {
                self.lists.push(key);
                let longer = self.lists.len() as List - 1;
                self.known.insert(key, longer);
                longer
            }
            None => return list,
        };
        self.last = (key, longer);
        longer
    }

    /// The readers of a list, the last one first.
    pub(super) fn of(&self, mut list: List) -> impl Iterator<Item = Segment> {
        std::iter::from_fn(move || {
            let (before, reader) = *self.lists.get(list as usize).filter(|_| list != 0)?;
            list = before;
            Some(reader)
        })
    }
}
