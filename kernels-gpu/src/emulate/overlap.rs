//! Launches that share their time: programmatic dependent launch (PTX ISA 9.7.12.13, `griddepcontrol`).
//!
//! A launch that may overlap starts once every block of the one before it has let it, or has ended. Its
//! `griddepcontrol.wait` then waits for the end of that one launch, and of no other: that older launches have
//! ended follows only where the launch before has waited in its turn.

/// What a launch may share its time with, and what it leaves to the next.
#[derive(Debug)]
pub(super) struct Overlap {
    /// Number of the launch, counted from 1.
    pub number: u32,
    /// Launches that may still run while this one does: for a thread that has not waited, and for one that
    /// has.
    running: [Vec<u32>; 2],
    /// A thread has waited, so when this launch has ended, so has what it waited for.
    waited: bool,
    /// A block has let the next launch start, or has ended, only after it had waited: so what it waited for
    /// has ended when the next launch starts.
    waited_first: bool,
}

impl Overlap {
    /// Launch `number`, which comes after `before`; `None` stands for a device that is idle.
    pub fn after(before: Option<&Overlap>, number: u32, overlaps: bool) -> Self {
        let running = match before {
            Some(before) if overlaps => {
                let mut at_start = before.running[usize::from(before.waited_first)].clone();
                at_start.push(before.number);
                [at_start, before.running[usize::from(before.waited)].clone()]
            }
            _ => Default::default(),
        };
        Overlap { number, running, waited: false, waited_first: false }
    }

    /// True when launch `other` may still run, as far as a thread knows that `has_waited` or not.
    pub fn may_run(&self, other: u32, has_waited: bool) -> bool {
        self.running[usize::from(has_waited)].contains(&other)
    }

    /// A block has ended. `has_waited`: one of its threads had waited; `launch_dependents`: whether all that
    /// let the next launch start had waited before, `None` when nobody did.
    pub fn end_block(&mut self, has_waited: bool, launch_dependents: Option<bool>) {
        self.waited |= has_waited;
        self.waited_first |= launch_dependents.unwrap_or(has_waited);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Launches 1 to 3, of which the second waits or not, and lets the third start before or after.
    fn third(second_has_waited: bool, launch_dependents: Option<bool>) -> Overlap {
        let mut first = Overlap::after(None, 1, true);
        first.end_block(true, Some(true));
        let mut second = Overlap::after(Some(&first), 2, true);
        second.end_block(second_has_waited, launch_dependents);
        Overlap::after(Some(&second), 3, true)
    }

    #[test]
    fn the_launch_before_may_run_until_it_was_waited_for() {
        let third = third(true, Some(true));
        assert!(third.may_run(2, false) && !third.may_run(2, true));
        assert!(!third.may_run(1, false) && !third.may_run(1, true));
    }

    #[test]
    fn who_lets_the_next_start_before_it_waits_lets_the_launch_before_run_on() {
        let third = third(true, Some(false));
        assert!(third.may_run(1, false) && !third.may_run(1, true));
    }

    #[test]
    fn who_never_waits_says_nothing_of_the_launch_before() {
        for launch_dependents in [None, Some(false)] {
            let third = third(false, launch_dependents);
            assert!(third.may_run(1, false) && third.may_run(1, true));
        }
    }

    #[test]
    fn a_launch_that_does_not_overlap_finds_nothing_running() {
        let second = Overlap::after(Some(&Overlap::after(None, 1, true)), 2, false);
        assert!(!second.may_run(1, false));
    }
}
