//! Which of a call's candidates runs.

use crate::plan::{
    DecodeRows, Form, Options, PrefillTile, Problem, TileKind, decode, generic, prefill, rules,
};

/// A way to run a call that is legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Candidate {
    /// One launch of clusters.
    Decode(decode::Candidate),
    /// One launch of warpgroups.
    Prefill(prefill::Candidate),
    /// `shrink`, then `expand`.
    Generic(generic::Candidate),
}

impl Candidate {
    /// Pairs of the tiles of a route that is made for it.
    pub fn route_rows(&self, problem: &Problem<'_>) -> u32 {
        match self {
            Candidate::Decode(candidate) => candidate.rows.count(),
            Candidate::Prefill(candidate) => candidate.route_rows(problem),
            Candidate::Generic(candidate) => candidate.tile.shape().rows(),
        }
    }
}

/// The candidate for a call: as it is forced, where that is legal, or the one that is likely the fastest.
pub(crate) fn choose(problem: &Problem<'_>, options: &Options) -> Candidate {
    rules::choose(problem, options)
}

/// What forces each candidate that a call with sizes in multiples of 8 can have, legal or not.
pub fn candidates() -> impl Iterator<Item = Options> {
    let decode = DecodeRows::ALL.into_iter().flat_map(|rows| {
        let of = move |cluster| (Some(rows), Some(cluster));
        decode::CLUSTERS.into_iter().map(of)
    });
    let decode = decode.map(|(rows, cluster)| Options {
        form: Some(Form::Decode),
        rows,
        cluster,
        ..Options::default()
    });
    let prefill =
        PrefillTile::ALL.into_iter().flat_map(|tile| [Form::Prefill(tile), Form::SharedPrefill(tile)]);
    let prefill = prefill.map(|form| Options { form: Some(form), ..Options::default() });
    let generic = [TileKind::M16, TileKind::M32, TileKind::M64].into_iter();
    let generic = generic.map(|tile| Options { tile: Some(tile), ..Options::default() });
    decode.chain(prefill).chain(generic)
}
