//! Launch bounds: what the language has no attribute for, written onto the PTX.
//!
//! Without `.maxntid` ptxas does not know how large a block is, and without `.minnctapersm` not how
//! many of them should share a multiprocessor; the two together bound the registers of a thread.
//! All follow an entry point's parameter list:
//!
//! ```text
//! .visible .entry shrink(
//!     .param .align 8 .b8 shrink_param_0[48]
//! )
//! .maxntid 128, 1, 1
//! .minnctapersm 2
//! {
//! ```

use moe_lora_kernels::Entry;

/// The name of the entry point that this line of PTX begins, if it begins one.
pub(crate) fn entry_name(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once(".entry ")?;
    let (name, _) = rest.split_once('(')?;
    Some(name.trim())
}

/// Writes the launch bounds of `entries` onto `ptx`. Entry points that the table lacks stay as they
/// are: [`crate::lint`] reports them.
pub fn stamp(ptx: &str, entries: &[Entry]) -> String {
    let mut stamped = String::with_capacity(ptx.len() + 64 * entries.len());
    // The entry point whose parameter list is being read.
    let mut open: Option<&Entry> = None;
    for line in ptx.lines() {
        stamped.push_str(line);
        stamped.push('\n');
        if let Some(name) = entry_name(line) {
            open = entries.iter().find(|entry| entry.name == name);
        }
        if line.trim_end().ends_with(')')
            && let Some(entry) = open.take()
        {
            let &Entry { threads, min_blocks, .. } = entry;
            stamped.push_str(&format!(".maxntid {threads}, 1, 1\n.minnctapersm {min_blocks}\n"));
        }
    }
    stamped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_entry;

    const ENTRIES: &[Entry] = &[test_entry("route", 1024, 1), test_entry("shrink", 128, 4)];

    #[test]
    fn bounds_follow_the_parameter_list() {
        let ptx = "\
.visible .entry shrink(
	.param .u64 .ptr .align 1 shrink_param_0,
	.param .align 8 .b8 shrink_param_1[48]
)
{
	call.uni (retval0), f, (param0);
	ret;
}
";
        let stamped = "\
.visible .entry shrink(
	.param .u64 .ptr .align 1 shrink_param_0,
	.param .align 8 .b8 shrink_param_1[48]
)
.maxntid 128, 1, 1
.minnctapersm 4
{
	call.uni (retval0), f, (param0);
	ret;
}
";
        assert_eq!(stamp(ptx, ENTRIES), stamped);
    }

    #[test]
    fn an_entry_without_parameters_is_stamped_too() {
        assert_eq!(
            stamp(".visible .entry route()\n{\n\tret;\n}\n", ENTRIES),
            ".visible .entry route()\n.maxntid 1024, 1, 1\n.minnctapersm 1\n{\n\tret;\n}\n"
        );
    }

    #[test]
    fn nothing_else_is_touched() {
        for ptx in [
            "",
            ".visible .entry route_2()\n{\n}\n",
            ".visible .func  (.param .b32 func_retval0) shrink(\n\t.param .b32 shrink_param_0\n)\n{\n}\n",
        ] {
            assert_eq!(stamp(ptx, ENTRIES), ptx);
        }
    }
}
