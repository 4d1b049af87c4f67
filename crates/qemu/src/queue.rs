//! Events that wait to be taken: bounded in number and in bytes, as the peer says how much it sends.

/// Events that may wait.
pub(crate) const MAX_EVENTS: usize = 16_384;

/// Bytes that all waiting events may have had on the wire. A common one has 200.
pub(crate) const MAX_BYTES: usize = 16 << 20;

/// More came than may wait.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {MAX_EVENTS} events, or {MAX_BYTES} bytes of them, that nobody took")]
pub(crate) struct Full;

#[derive(Debug)]
pub(crate) struct Queue<T> {
    events: Vec<T>,
    bytes: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { events: Vec::new(), bytes: 0 }
    }
}

impl<T> Queue<T> {
    /// Adds an event that had so many bytes.
    pub(crate) fn push(&mut self, event: T, bytes: usize) -> Result<(), Full> {
        let bytes = self.bytes.saturating_add(bytes);
        if self.events.len() >= MAX_EVENTS || bytes > MAX_BYTES {
            return Err(Full);
        }
        self.bytes = bytes;
        self.events.push(event);
        Ok(())
    }

    /// Takes them all, in order.
    pub(crate) fn take(&mut self) -> Vec<T> {
        self.bytes = 0;
        std::mem::take(&mut self.events)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_many_nor_long_events_are_too_much() {
        let mut queue = Queue::default();
        for n in 0..MAX_EVENTS {
            assert_eq!(queue.push(n, 1), Ok(()));
        }
        assert_eq!(queue.push(0, 1), Err(Full));
        assert_eq!(queue.take().len(), MAX_EVENTS);
        assert!(queue.is_empty());
        assert_eq!(queue.push(0, MAX_BYTES), Ok(()));
        assert_eq!(queue.push(0, 1), Err(Full));
        queue.take();
        assert_eq!(queue.push(0, usize::MAX), Err(Full));
    }
}
