//! Which of a call's candidates runs: the one that is likely to be the fastest.

use crate::call::Layout;
use crate::error::Result;
use crate::plan::costs::Costs;
use crate::plan::likely::Likely;
use crate::plan::{
    DecodeRows, DeviceLimits, Form, Options, PrefillTile, Problem, RouteSource, Stage, TileKind, decode,
    generic, prefill,
};
use crate::projection::Projection;
use moe_lora_kernels as kernels;

/// A legal way to run a call.
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
    /// All that are legal for a call.
    fn all<'p>(problem: &'p Problem<'_>) -> impl Iterator<Item = Self> + 'p {
        let decode = kernels::DecodeRows::ALL.into_iter().flat_map(move |rows| {
            let of = move |cluster| decode::Candidate::legal(problem, rows, cluster);
            decode::CLUSTERS.into_iter().filter_map(of)
        });
        let prefill = PrefillTile::ALL.into_iter().flat_map(move |tile| {
            let of = move |shared| prefill::Candidate::legal(problem, tile, shared);
            [false, true].into_iter().filter_map(of)
        });
        let tiles = kernels::TileKind::ALL.into_iter();
        let generic = tiles.filter_map(move |tile| generic::Candidate::legal(problem, tile));
        let all = decode.map(Candidate::Decode).chain(prefill.map(Candidate::Prefill));
        all.chain(generic.map(Candidate::Generic))
    }

    /// Pairs of the tiles of a route that is made for it.
    pub fn route_rows(&self, problem: &Problem<'_>) -> u32 {
        match self {
            Candidate::Decode(candidate) => candidate.rows.count(),
            Candidate::Prefill(candidate) => candidate.route_rows(problem),
            Candidate::Generic(candidate) => candidate.tile.shape().rows(),
        }
    }

    /// Microseconds that the call is likely to take so, with what makes its route.
    fn cost(&self, problem: &Problem<'_>, likely: &Likely, costs: &Costs) -> f64 {
        let with_route = match self {
            Candidate::Decode(candidate) => return candidate.cost(problem, likely, costs),
            Candidate::Prefill(candidate) => candidate.cost(problem, likely, costs),
            Candidate::Generic(candidate) => candidate.cost(problem, likely, costs),
        };
        match problem.route {
            RouteSource::Made => with_route,
            RouteSource::Sorted { .. } | RouteSource::Kept { .. } => with_route - costs.decode_m8.route,
        }
    }

    /// What forces it.
    fn options(&self) -> Options {
        let none = Options::default();
        match self {
            Candidate::Decode(candidate) => Options {
                form: Some(Form::Decode),
                rows: Some(candidate.rows.into()),
                cluster: Some(candidate.cluster),
                ..none
            },
            Candidate::Prefill(candidate) => Options { form: Some(candidate.form()), ..none },
            Candidate::Generic(candidate) => Options { tile: Some(candidate.tile.into()), ..none },
        }
    }

    /// How far it is from what is forced, 0 where it is all of that; `None` where it is not to be taken at
    /// all. Of a form that is not legal the generic one, which always is, comes next.
    fn distance(&self, problem: &Problem<'_>, options: &Options) -> Option<u32> {
        let form = options.form.or(options.tile.map(|_| Form::Generic));
        let differs = |wanted: Option<bool>| u32::from(wanted == Some(false));
        match (self, form) {
            (Candidate::Decode(candidate), None | Some(Form::Decode)) => {
                let rows = options.rows.map(|rows| candidate.rows == rows.into());
                let cluster =
                    options.cluster.map(|blocks| candidate.cluster == decode::nearest_cluster(blocks));
                let is_known = form.is_some() || decode::is_known(problem);
                is_known.then_some(2 * differs(rows) + differs(cluster))
            }
            (Candidate::Prefill(_), None) => Some(0),
            (Candidate::Prefill(candidate), Some(form)) => {
                let other = Form::prefill(form.is_shared()?, candidate.tile);
                (candidate.form() == other).then_some(u32::from(other != form))
            }
            // It is as fast as the smallest, which takes the same calls and more.
            (Candidate::Generic(generic::Candidate { tile: kernels::TileKind::Any }), _)
                if problem.vectors && options.tile != Some(TileKind::Any) =>
            {
                None
            }
            (Candidate::Generic(candidate), None | Some(Form::Generic)) => {
                Some(differs(options.tile.map(|tile| candidate.tile == tile.into())))
            }
            (Candidate::Generic(candidate), Some(_)) => {
                Some(FURTHEST + differs(options.tile.map(|tile| candidate.tile == tile.into())))
            }
            (Candidate::Decode(_), Some(_)) => None,
        }
    }
}

/// Further than any candidate of the form that is forced.
const FURTHEST: u32 = 4;

/// The candidate for a call: of those that are nearest to what is forced, the one that costs least.
pub(crate) fn choose(problem: &Problem<'_>, options: &Options) -> Candidate {
    let (likely, costs) = (Likely::of(problem), Costs::of(problem.limits));
    let mut chosen: Option<(u32, f64, Candidate)> = None;
    for candidate in Candidate::all(problem) {
        let Some(distance) = candidate.distance(problem, options) else { continue };
        if chosen.is_some_and(|(nearest, ..)| distance > nearest) {
            continue;
        }
        let cost = candidate.cost(problem, &likely, costs);
        let is_better = |&(nearest, least, _): &(u32, f64, Candidate)| {
            distance < nearest || cost.total_cmp(&least).is_lt()
        };
        if chosen.as_ref().is_none_or(is_better) {
            chosen = Some((distance, cost, candidate));
        }
    }
    chosen.map(|(.., candidate)| candidate).expect("the generic form is legal for every call")
}

/// What forces each candidate that is legal for a whole call and whose costs are known, and the microseconds
/// that the call is likely to take so, by these costs: the cheapest first.
///
/// # Errors
/// As for [`Plan::new`](super::Plan::new).
pub fn predict(
    projection: &Projection,
    layout: &Layout,
    route: RouteSource,
    limits: &DeviceLimits,
    costs: &Costs,
) -> Result<Vec<(Options, f64)>> {
    let problem = Problem::new(projection, layout, Stage::Forward, route, limits)?;
    let (likely, none) = (Likely::of(&problem), Options::default());
    let known = Candidate::all(&problem).filter(|candidate| candidate.distance(&problem, &none).is_some());
    let cost = |candidate: Candidate| (candidate.options(), candidate.cost(&problem, &likely, costs));
    let mut all: Vec<_> = known.map(cost).collect();
    all.sort_by(|(_, one), (_, other)| one.total_cmp(other));
    Ok(all)
}

/// What forces each candidate that a call with sizes in multiples of 8 can have, legal or not.
pub fn candidates() -> impl Iterator<Item = Options> {
    let none = Options::default();
    let decode = DecodeRows::ALL.into_iter().flat_map(move |rows| {
        let of = move |cluster| Options {
            form: Some(Form::Decode),
            rows: Some(rows),
            cluster: Some(cluster),
            ..none
        };
        decode::CLUSTERS.into_iter().map(of)
    });
    let prefill = PrefillTile::ALL.into_iter().flat_map(move |tile| {
        [false, true].map(|shared| Options { form: Some(Form::prefill(shared, tile)), ..none })
    });
    let generic = [TileKind::M16, TileKind::M32, TileKind::M64];
    let generic = generic.into_iter().map(move |tile| Options { tile: Some(tile), ..none });
    decode.chain(prefill).chain(generic)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::projection::ProjectionSizes;

    /// A call of one of two models, w13, on a route of its own.
    fn with_problem(large: bool, tokens: usize, limits: &DeviceLimits, check: impl FnOnce(&Problem<'_>)) {
        let sizes = match large {
            true => {
                ProjectionSizes { experts: 8, top_k: 2, slots: 2, ..ProjectionSizes::gate_up(4096, 14_336) }
            }
            false => {
                ProjectionSizes { experts: 128, top_k: 8, slots: 2, ..ProjectionSizes::gate_up(2048, 768) }
            }
        };
        let projection = Projection::new(sizes).expect("sizes as a model has them");
        let layout = Layout::packed(&projection, tokens);
        let problem = Problem::new(&projection, &layout, Stage::Forward, RouteSource::Made, limits);
        check(&problem.expect("no size is too large"));
    }

    const CALLS: [(bool, usize); 6] =
        [(false, 1), (false, 80), (false, 4096), (true, 2), (true, 512), (true, 8192)];

    #[test]
    fn what_is_forced_is_taken_where_it_is_legal() {
        for (large, tokens) in CALLS {
            with_problem(large, tokens, &DeviceLimits::H100, |problem| {
                let all: Vec<_> = Candidate::all(problem).collect();
                assert!(all.len() >= 9, "{tokens} tokens");
                for candidate in all {
                    assert_eq!(choose(problem, &candidate.options()), candidate, "{tokens} tokens");
                }
            });
        }
    }

    #[test]
    fn of_what_is_forced_and_not_legal_the_nearest_is_taken() {
        let none = Options::default();
        let form = |form| Options { form: Some(form), ..none };
        let without = DeviceLimits { decode_clusters: [0; 4], wgmma: false, ..DeviceLimits::H100 };
        with_problem(false, 16, &without, |problem| {
            for form in [Form::Decode, Form::Prefill(PrefillTile::M64)].map(form) {
                assert!(matches!(choose(problem, &form), Candidate::Generic(_)));
            }
            let in_m32 = Options { tile: Some(TileKind::M32), ..form(Form::Decode) };
            let m32 = generic::Candidate { tile: kernels::TileKind::M32 };
            assert_eq!(choose(problem, &in_m32), Candidate::Generic(m32));
        });
        // Tiles of 128 pairs would be an eighth full at best.
        with_problem(false, 16, &DeviceLimits::H100, |problem| {
            let route = RouteSource::Kept { tile_rows: 16, ranked: false };
            let problem = Problem { route, ..*problem };
            let Candidate::Prefill(chosen) = choose(&problem, &form(Form::Prefill(PrefillTile::M128))) else {
                panic!("tiles of 64 pairs take tiles of 16");
            };
            assert_eq!(chosen.tile, PrefillTile::M64);
        });
    }

    #[test]
    fn the_cheapest_is_chosen_and_predicted_first() {
        for (large, tokens) in CALLS {
            for limits in [DeviceLimits::H100, DeviceLimits::H200] {
                with_problem(large, tokens, &limits, |problem| {
                    let costs = Costs::of(&limits);
                    let predicted =
                        predict(problem.projection, problem.layout, problem.route, &limits, costs);
                    let predicted = predicted.expect("no size is too large");
                    let chosen = choose(problem, &Options::default());
                    assert_eq!(predicted[0].0, chosen.options(), "{tokens} tokens");
                    let times: Vec<_> = predicted.iter().map(|(_, time)| *time).collect();
                    assert!(times.is_sorted() && times[0] > 1.0, "{tokens} tokens: {times:?}");
                });
            }
        }
    }
}
