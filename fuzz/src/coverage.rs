//! What of the code an input has reached, in programs that count it: those that are built with
//! `RUSTFLAGS='-C instrument-coverage --cfg katana_coverage'`, which any toolchain takes. There, an input that reaches
//! something new becomes part of the corpus.

/// For each counter of the program, the magnitudes that it has had after an input, a bit each.
#[derive(Default)]
pub struct Coverage {
    #[cfg_attr(not(katana_coverage), allow(dead_code, reason = "there are no counters"))]
    seen: Vec<u8>,
}

#[cfg(not(katana_coverage))]
impl Coverage {
    /// Whether the last input reached anything new.
    #[allow(clippy::unused_self, reason = "there are no counters")]
    pub fn is_new(&mut self) -> bool {
        false
    }
}

#[cfg(katana_coverage)]
impl Coverage {
    /// Whether the last input reached anything new, or something more often than any before; begins to count anew.
    pub fn is_new(&mut self) -> bool {
        // In LLVM's runtime, compiler-rt/lib/profile/InstrProfiling.h.
        unsafe extern "C" {
            fn __llvm_profile_begin_counters() -> *mut u64;
            fn __llvm_profile_end_counters() -> *mut u64;
        }
        // SAFETY: they answer the two ends of a section of the program.
        let (first, end) = unsafe { (__llvm_profile_begin_counters(), __llvm_profile_end_counters()) };
        let mut new = false;
        // SAFETY: they are of one section, and the second is not before the first.
        self.seen.resize(usize::try_from(unsafe { end.offset_from(first) }).unwrap_or(0), 0);
        for (index, seen) in self.seen.iter_mut().enumerate() {
            // SAFETY: between the ends. Threads that count may change it at any time, hence as volatile memory.
            let count = unsafe { first.add(index).read_volatile() };
            if count != 0 {
                // 1, 2 and 3, 4 to 7, ..., 128 and more.
                let magnitude = 1 << count.ilog2().min(7);
                new |= *seen & magnitude == 0;
                *seen |= magnitude;
                // SAFETY: as above.
                unsafe { first.add(index).write_volatile(0) };
            }
        }
        new
    }
}
