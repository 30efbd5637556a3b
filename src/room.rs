//! Memory whose size an image decides, asked for so that the answer may be no: `NoMemory`, where the
//! same methods of `Vec` end the process. `clippy.toml` forbids those in `image` and `snapshot`.
#![allow(clippy::disallowed_methods)] // here they come behind a reservation

use crate::error::{Error, Result};
use std::borrow::Cow;
use std::collections::HashMap;

/// Room for `more` items. What grows item by item grows by half at least.
pub(crate) fn reserve<T>(list: &mut Vec<T>, more: usize) -> Result<()> {
    let bytes = || (more as u64).saturating_mul(size_of::<T>() as u64);
    list.try_reserve(more)
        .map_err(|_| Error::NoMemory(bytes().max(size_of_val(list.as_slice()) as u64)))
}

pub(crate) fn push<T>(list: &mut Vec<T>, item: T) -> Result<()> {
    reserve(list, 1)?;
    list.push(item);
    Ok(())
}

pub(crate) fn append<T: Copy>(list: &mut Vec<T>, items: &[T]) -> Result<()> {
    reserve(list, items.len())?;
    list.extend_from_slice(items);
    Ok(())
}

pub(crate) fn resize<T: Clone>(list: &mut Vec<T>, len: usize, item: T) -> Result<()> {
    reserve(list, len.saturating_sub(list.len()))?;
    list.resize(len, item);
    Ok(())
}

pub(crate) fn copy_of<T: Copy>(items: &[T]) -> Result<Vec<T>> {
    let mut list = exactly(items.len())?;
    list.extend_from_slice(items);
    Ok(list)
}

pub(crate) fn filled<T: Clone>(len: usize, item: T) -> Result<Vec<T>> {
    let mut list = exactly(len)?;
    list.resize(len, item);
    Ok(list)
}

fn exactly<T>(len: usize) -> Result<Vec<T>> {
    let mut list = Vec::new();
    list.try_reserve_exact(len)
        .map_err(|_| Error::NoMemory((len as u64).saturating_mul(size_of::<T>() as u64)))?;
    Ok(list)
}

pub(crate) fn collected<T>(mut items: impl Iterator<Item = T>) -> Result<Vec<T>> {
    let least = items.size_hint().0;
    let mut list = exactly(least)?;
    list.extend(items.by_ref().take(least));
    for item in items {
        push(&mut list, item)?;
    }
    Ok(list)
}

pub(crate) fn owned(bytes: Cow<'_, [u8]>) -> Result<Vec<u8>> {
    match bytes {
        Cow::Owned(bytes) => Ok(bytes),
        Cow::Borrowed(bytes) => copy_of(bytes),
    }
}

/// A `Box` (of one) for what there may be a million of.
pub(crate) fn boxed<T>(item: T) -> Result<Box<[T; 1]>> {
    let mut one = exactly(1)?;
    one.push(item);
    one.try_into()
        .map_err(|_| Error::NoMemory(size_of::<T>() as u64))
}

/// What is known of some places of the file. Hostile images choose them, so the hash is the standard
/// one.
pub(crate) struct Known<V>(HashMap<u64, V>);

impl<V> Default for Known<V> {
    fn default() -> Known<V> {
        Known(HashMap::new())
    }
}

impl<V> Known<V> {
    pub(crate) fn insert(&mut self, key: u64, value: V) -> Result<()> {
        self.make_room()?;
        self.0.insert(key, value);
        Ok(())
    }

    /// What is known of `key`, to be changed.
    pub(crate) fn or_default(&mut self, key: u64) -> Result<&mut V>
    where
        V: Default,
    {
        self.make_room()?;
        Ok(self.0.entry(key).or_default())
    }

    fn make_room(&mut self) -> Result<()> {
        let bytes = (self.0.len() as u64).saturating_mul(size_of::<(u64, V)>() as u64);
        self.0
            .try_reserve(1)
            .map_err(|_| Error::NoMemory(bytes.saturating_mul(2)))
    }

    pub(crate) fn remove(&mut self, key: u64) {
        self.0.remove(&key);
    }

    pub(crate) fn get(&self, key: u64) -> Option<&V> {
        self.0.get(&key)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The places, in order.
    pub(crate) fn sorted(&self) -> Result<Vec<u64>> {
        let mut keys = collected(self.0.keys().copied())?;
        keys.sort_unstable();
        Ok(keys)
    }
}

/// A set of clusters. Neighbours share a word: a verb may take millions of clusters in a row.
#[derive(Default)]
pub(crate) struct Clusters {
    words: Known<u64>,
    n: usize,
}

impl Clusters {
    fn place(cluster: u64) -> (u64, u64) {
        (cluster >> 6, 1 << (cluster & 63))
    }

    pub(crate) fn insert(&mut self, cluster: u64) -> Result<()> {
        let (word, bit) = Clusters::place(cluster);
        let word = self.words.or_default(word)?;
        self.n += usize::from(*word & bit == 0);
        *word |= bit;
        Ok(())
    }

    /// Was it there?
    pub(crate) fn remove(&mut self, cluster: u64) -> bool {
        let (word, bit) = Clusters::place(cluster);
        let Some(word) = self.words.0.get_mut(&word).filter(|w| **w & bit != 0) else {
            return false;
        };
        *word &= !bit;
        self.n -= 1;
        true
    }

    pub(crate) fn contains(&self, cluster: u64) -> bool {
        let (word, bit) = Clusters::place(cluster);
        self.n != 0 && self.words.get(word).is_some_and(|w| w & bit != 0)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.n
    }

    /// The clusters, in order.
    pub(crate) fn sorted(&self) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        reserve(&mut all, self.n)?;
        for word in self.words.sorted()? {
            let bits = self.words.get(word).copied().unwrap_or(0);
            for bit in (0..64).filter(|b| bits >> b & 1 != 0) {
                push(&mut all, word << 6 | bit)?;
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_too_much_is_an_error_and_the_rest_as_the_methods_that_end_the_process() {
        let mut list = vec![1u8, 2];
        assert!(resize(&mut list, isize::MAX as usize + 1, 0).is_err());
        assert!(collected(std::iter::repeat_n(0u64, usize::MAX / 4)).is_err());
        append(&mut list, &[3]).unwrap();
        push(&mut list, 4).unwrap();
        resize(&mut list, 6, 9).unwrap();
        assert_eq!(copy_of(&list).unwrap(), [1, 2, 3, 4, 9, 9]);
        assert_eq!(boxed(7).unwrap()[0], 7);
        assert_eq!(owned(Cow::Borrowed(&[5])).unwrap(), [5]);
        let mut known = Known::default();
        for key in [3, 1, 2, 1] {
            known.insert(key, key).unwrap();
        }
        assert_eq!(known.sorted().unwrap(), [1, 2, 3]);
        known.remove(1);
        assert!(known.len() == 2 && known.get(2) == Some(&2) && known.get(1).is_none());
        let mut set = Clusters::default();
        for cluster in [u64::MAX, 64, 63, 64, 0] {
            set.insert(cluster).unwrap();
        }
        assert_eq!(set.sorted().unwrap(), [0, 63, 64, u64::MAX]);
        assert!(set.remove(63) && !set.remove(63) && !set.remove(1) && set.len() == 3);
        assert!(set.contains(64) && set.contains(u64::MAX) && !set.contains(63));
    }
}
