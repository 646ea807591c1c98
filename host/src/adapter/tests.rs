use super::*;
use crate::dtype::Element;
use crate::projection::{OutDims, Projection, XRows};
use crate::tensor_file::FileError;
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use std::fs;
use tempfile::TempDir;

/// A tensor of a file under test.
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn f32s(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    assert_eq!(values.len(), shape.iter().product::<usize>());
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor { name: name.into(), dtype: Dtype::F32, shape: shape.into(), bytes }
}

const LAYER_0: &str = "base_model.model.model.layers.0.mlp.experts";

/// `lora_A` `[r, K]` of ones and `lora_B` `[N, r]` of twos of one expert's module.
fn lora(module: &str, [r, k, n]: [usize; 3]) -> Vec<Tensor> {
    vec![
        f32s(&format!("{module}.lora_A.weight"), &[r, k], &vec![1.0; r * k]),
        f32s(&format!("{module}.lora_B.weight"), &[n, r], &vec![2.0; n * r]),
    ]
}

fn config() -> Value {
    json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "target_modules": ["gate_proj"] })
}

fn with(field: &str, value: Value) -> Value {
    let mut config = config();
    config[field] = value;
    config
}

fn file(tensors: &[Tensor]) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|t| (t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    serialize(views, None).unwrap()
}

/// A safetensors file with this header, well-formed or not, and 64 bytes of data.
fn raw(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 64]].concat()
}

fn folder(config: &[u8], weights: &[u8]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("adapter_config.json"), config).unwrap();
    fs::write(folder.path().join("adapter_model.safetensors"), weights).unwrap();
    folder
}

fn open(config: &Value, tensors: &[Tensor]) -> Result<Adapter, AdapterError> {
    Adapter::open(folder(config.to_string().as_bytes(), &file(tensors)).path())
}

fn load<T: Element>(
    config: &Value,
    tensors: &[Tensor],
    which: LayerProjection,
) -> Result<Stack<T>, AdapterError> {
    Stack::load(&[open(config, tensors)?], 0, which, 2, None)
}

/// The variant of an error, for tables.
fn variant(error: &AdapterError) -> &'static str {
    match error {
        AdapterError::File(file) => match file {
            FileError::Io { .. } => "Io",
            FileError::NotAFile { .. } => "NotAFile",
            FileError::Header { .. } => "Header",
            FileError::Extent { .. } => "Extent",
            FileError::Missing { .. } => "Missing",
            FileError::DType { .. } => "DType",
            FileError::Shape { .. } => "Shape",
        },
        AdapterError::Pickled { .. } => "Pickled",
        AdapterError::Json { .. } => "Json",
        AdapterError::Config { field, .. } => field,
        AdapterError::UnknownTensor { .. } => "UnknownTensor",
        AdapterError::Duplicate { .. } => "Duplicate",
        AdapterError::Unpaired { .. } => "Unpaired",
        AdapterError::ExpertOutOfRange { .. } => "ExpertOutOfRange",
        AdapterError::NotFinite { .. } => "NotFinite",
        AdapterError::NothingToStack { .. } => "NothingToStack",
        AdapterError::Sizes(_) => "Sizes",
        AdapterError::OutOfMemory { .. } => "OutOfMemory",
    }
}

#[test]
fn a_configuration_that_would_change_the_result_is_refused_by_its_field() {
    let weights = lora(&format!("{LAYER_0}.0.gate_proj"), [2, 4, 3]);
    for (field, value) in [
        ("peft_type", json!("LOHA")),
        ("peft_type", Value::Null),
        ("bias", json!("lora_only")),
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({ "nblocks": 2 })),
        ("kasa_config", json!({ "beta": 1e-4 })),
        ("arrow_config", json!({ "top_k": 3 })),
        ("monteclora_config", json!({ "samples": 8 })),
        ("rank_pattern", json!({ "experts.[0-9]+.gate_proj": 4 })),
        ("rank_pattern", json!({ "gate_proj": 0 })),
        ("alpha_pattern", json!({ "^model.layers.0.mlp": 4 })),
        ("alpha_pattern", json!({ "gate_proj": "8" })),
    ] {
        let error = open(&with(field, value.clone()), &weights).unwrap_err();
        assert_eq!(variant(&error), field, "{field}: {value}: {error}");
        assert!(error.to_string().contains("adapter_config.json"), "{error}");
    }
    for (field, value) in [("r", json!(0)), ("r", json!("8")), ("lora_alpha", Value::Null)] {
        let error = open(&with(field, value.clone()), &weights).unwrap_err();
        assert_eq!(variant(&error), "Json", "{field}: {value}: {error}");
    }
    // What does not change the result is no reason to refuse.
    for (field, value) in
        [("use_dora", json!(false)), ("kasa_config", Value::Null), ("lora_dropout", json!(0.1))]
    {
        open(&with(field, value), &weights).unwrap();
    }
}

#[test]
fn a_malformed_folder_is_refused() {
    let good_config = config().to_string();
    let good_weights = file(&lora(&format!("{LAYER_0}.0.gate_proj"), [2, 4, 3]));
    let tensor = |body: &str| raw(&format!(r#"{{"{LAYER_0}.0.up_proj.lora_A.weight":{body}}}"#));
    let huge = r#"{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,64]}"#;
    for (what, config, weights, expected) in [
        ("config is empty", "", good_weights.clone(), "Json"),
        ("config is a list", "[]", good_weights.clone(), "Json"),
        ("file is empty", &good_config, vec![], "Header"),
        ("file ends in its header", &good_config, good_weights[..40].to_vec(), "Header"),
        ("header claims 2^64 - 1 bytes", &good_config, vec![0xff; 64], "Header"),
        ("header is not JSON", &good_config, raw("{\"a\":"), "Header"),
        (
            "header is not UTF-8",
            &good_config,
            [&[2, 0, 0, 0, 0, 0, 0, 0][..], &[0xc3, 0x28]].concat(),
            "Header",
        ),
        (
            "type is unknown",
            &good_config,
            tensor(r#"{"dtype":"F31","shape":[16],"data_offsets":[0,64]}"#),
            "Header",
        ),
        (
            "size is negative",
            &good_config,
            tensor(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,64]}"#),
            "Header",
        ),
        ("data past the end", &good_config, good_weights[..good_weights.len() - 1].to_vec(), "Extent"),
        (
            "extent runs backwards",
            &good_config,
            tensor(r#"{"dtype":"F32","shape":[2,4],"data_offsets":[32,0]}"#),
            "Extent",
        ),
        (
            "extent is too small",
            &good_config,
            tensor(r#"{"dtype":"F32","shape":[2,9],"data_offsets":[0,64]}"#),
            "Extent",
        ),
        ("shape overflows", &good_config, tensor(huge), "Extent"),
    ] {
        let folder = folder(config.as_bytes(), &weights);
        let error = Adapter::open(folder.path()).expect_err(what);
        assert_eq!(variant(&error), expected, "{what}: {error}");
        assert!(error.to_string().contains("adapter_"), "{what}: {error} names no file");
    }

    let missing = folder(good_config.as_bytes(), &[]);
    fs::remove_file(missing.path().join("adapter_model.safetensors")).unwrap();
    assert_eq!(variant(&Adapter::open(missing.path()).unwrap_err()), "Io");
    fs::write(missing.path().join("adapter_model.bin"), b"pickle").unwrap();
    assert_eq!(variant(&Adapter::open(missing.path()).unwrap_err()), "Pickled");
}

#[test]
fn weights_that_do_not_fit_together_are_refused() {
    let gate = |expert: usize, sizes| lora(&format!("{LAYER_0}.{expert}.gate_proj"), sizes);
    let also = |mut weights: Vec<Tensor>, more: Vec<Tensor>| {
        weights.extend(more);
        weights
    };
    let one = |name: &str| vec![f32s(&format!("{LAYER_0}.{name}"), &[2, 4], &[1.0; 8])];
    let good = || gate(0, [2, 4, 3]);
    let retyped = |dtype, bytes| {
        let mut weights = good();
        (weights[0].dtype, weights[0].bytes) = (dtype, bytes);
        weights
    };
    let nan = vec![f32s(&good()[0].name, &[2, 4], &[f32::NAN; 8]), good().remove(1)];
    for (what, weights, expected) in [
        ("no weights at all", vec![], "NothingToStack"),
        ("another layer's", lora("model.layers.1.mlp.experts.0.gate_proj", [2, 4, 3]), "NothingToStack"),
        ("a alone", one("0.gate_proj.lora_A.weight"), "Unpaired"),
        ("b alone", one("0.gate_proj.lora_B.weight"), "Unpaired"),
        ("DoRA's magnitudes", also(good(), one("0.gate_proj.lora_magnitude_vector")), "UnknownTensor"),
        ("a bias", also(good(), one("0.gate_proj.lora_B.bias")), "UnknownTensor"),
        ("experts in one tensor", also(good(), one("base_layer.lora_A.weight")), "UnknownTensor"),
        ("a fourth matrix", also(good(), one("0.side_proj.lora_A.weight")), "UnknownTensor"),
        ("no expert's number", also(good(), one("-1.gate_proj.lora_A.weight")), "UnknownTensor"),
        ("two names, one matrix", also(good(), lora(&format!("{LAYER_0}.0.w1"), [2, 4, 3])), "Duplicate"),
        (
            "two numbers, one expert",
            also(good(), lora(&format!("{LAYER_0}.00.gate_proj"), [2, 4, 3])),
            "Duplicate",
        ),
        ("rank other than r", gate(0, [3, 4, 3]), "Shape"),
        ("b's rank other than a's", vec![good().remove(0), gate(0, [3, 4, 2]).remove(1)], "Shape"),
        ("K is 0", gate(0, [2, 0, 3]), "Shape"),
        ("N is 0", gate(0, [2, 4, 0]), "Shape"),
        ("experts differ in K", also(good(), gate(1, [2, 5, 3])), "Shape"),
        ("experts differ in N", also(good(), gate(1, [2, 4, 2])), "Shape"),
        ("a vector", vec![f32s(&good()[0].name, &[8], &[1.0; 8]), good().remove(1)], "Shape"),
        ("integers", retyped(Dtype::I32, vec![0; 32]), "DType"),
        ("double precision", retyped(Dtype::F64, vec![0; 64]), "DType"),
        ("an expert no model has", gate(4_000_000_000, [2, 4, 3]), "ExpertOutOfRange"),
        ("not a number", nan, "NotFinite"),
    ] {
        let error = load::<bf16>(&config(), &weights, LayerProjection::W13).expect_err(what);
        assert_eq!(variant(&error), expected, "{what}: {error}");
    }

    let r = Projection::MAX_RANK + 1;
    let error = load::<bf16>(&with("r", json!(r)), &gate(0, [r, 4, 3]), LayerProjection::W13).unwrap_err();
    assert_eq!(variant(&error), "Sizes", "{error}");
    let error = Stack::<bf16>::load(
        &[open(&config(), &gate(7, [2, 4, 3])).unwrap()],
        0,
        LayerProjection::W13,
        2,
        Some(7),
    );
    assert_eq!(variant(&error.unwrap_err()), "ExpertOutOfRange");
    // 2.0 · 6e4 is a number in bf16 and not in f16.
    let loud = with("lora_alpha", json!(1.2e5));
    load::<bf16>(&loud, &good(), LayerProjection::W13).unwrap();
    assert_eq!(variant(&load::<f16>(&loud, &good(), LayerProjection::W13).unwrap_err()), "NotFinite");
}

#[test]
fn a_message_names_file_tensor_expected_and_got() {
    let weights = lora(&format!("{LAYER_0}.0.gate_proj"), [3, 4, 5]);
    let message = open(&config(), &weights).unwrap_err().to_string();
    for part in ["adapter_model.safetensors", "experts.0.gate_proj.lora_A.weight", "[3, 4]", "r = 2"] {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn stacking_places_every_matrix_and_leaves_zeros_elsewhere() {
    let k_proj = "base_model.model.model.layers.0.self_attn.k_proj";
    let shared = "base_model.model.model.layers.0.mlp.shared_expert.gate_proj";
    let mut first = lora(&format!("{LAYER_0}.1.up_proj"), [2, 4, 3]);
    first.extend(lora(k_proj, [2, 4, 4]));
    first.extend(lora(shared, [2, 4, 9]));
    let second = lora(&format!("{LAYER_0}.0.w1"), [1, 4, 3]);
    let adapters = [
        open(&config(), &first).unwrap(),
        open(&json!({ "peft_type": "LORA", "r": 1, "lora_alpha": 5 }), &second).unwrap(),
        open(&config(), &lora("model.layers.9.mlp.experts.0.up_proj", [2, 4, 3])).unwrap(),
    ];
    let stack = Stack::<f16>::load(&adapters, 0, LayerProjection::W13, 2, Some(3)).unwrap();
    assert_eq!(stack.ranks, [2, 1, 0]);
    let sizes = stack.projection.sizes();
    assert_eq!((sizes.slots, sizes.experts, sizes.max_rank), (3, 3, 2));
    assert_eq!((sizes.in_dim, sizes.out_dims, sizes.x_rows), (4, OutDims::uniform(3, 2), XRows::Token));

    // (slice, slot, expert) of the only matrices there are, with their rank and b's value.
    let present = [((1, 0, 1), 2, 2.0 * 3.0), ((0, 1, 0), 1, 2.0 * 5.0)];
    let expected = |slice, slot, expert, rank: usize| {
        present.iter().find(|p| p.0 == (slice, slot, expert) && rank < p.1).map_or((0.0, 0.0), |p| (1.0, p.2))
    };
    for (slice, slot, expert) in (0..18).map(|i| (i / 9, i / 3 % 3, i % 3)) {
        let matrix = slot * 3 + expert;
        for (rank, column) in (0..8).map(|i| (i / 4, i % 4)) {
            let got = stack.a[slice][(matrix * 2 + rank) * 4 + column].to_f32();
            assert_eq!(
                got,
                expected(slice, slot, expert, rank).0,
                "a[{slice}][{slot}, {expert}, {rank}, {column}]"
            );
        }
        for (row, rank) in (0..6).map(|i| (i / 2, i % 2)) {
            let got = stack.b[slice][(matrix * 3 + row) * 2 + rank].to_f32();
            assert_eq!(
                got,
                expected(slice, slot, expert, rank).1,
                "b[{slice}][{slot}, {expert}, {row}, {rank}]"
            );
        }
    }
}

#[test]
fn both_projections_of_a_layer_can_share_a_route() {
    let mut first = lora(&format!("{LAYER_0}.4.down_proj"), [3, 5, 2]);
    first.extend(lora(&format!("{LAYER_0}.1.up_proj"), [1, 4, 3]));
    let mut config = with("rank_pattern", json!({ "down_proj": 3 }));
    config["r"] = json!(1);
    let adapters = [open(&config, &first).unwrap()];
    let load = |which| Stack::<bf16>::load(&adapters, 0, which, 2, None).unwrap();
    let (w13, w2) = (load(LayerProjection::W13), load(LayerProjection::W2));
    assert_eq!((&w13.ranks, &w2.ranks), (&vec![3], &vec![3]));
    let shared = |stack: &Stack<bf16>| (stack.projection.sizes().experts, stack.projection.sizes().max_rank);
    assert_eq!((shared(&w13), shared(&w2)), ((5, 3), (5, 3)));
}

#[test]
fn patterns_decide_by_the_first_key_that_ends_the_modules_name() {
    let module = |expert: usize| format!("{LAYER_0}.{expert}.down_proj");
    let weights: Vec<Tensor> =
        [(0, 4), (1, 1), (11, 2)].into_iter().flat_map(|(e, r)| lora(&module(e), [r, 5, 2])).collect();
    let mut config = config();
    config["rank_pattern"] =
        json!({ "model.layers.0.mlp.experts.0.down_proj": 4, "1.down_proj": 1, "down_proj": 2 });
    config["alpha_pattern"] = json!({ "experts.0.down_proj": 10.0, "own_proj": 1e9 });
    let stack = load::<f16>(&config, &weights, LayerProjection::W2).unwrap();
    assert_eq!((stack.ranks[0], stack.projection.sizes().max_rank), (4, 4));
    for (expert, scaling) in [(0, 10.0 / 4.0), (1, 6.0 / 1.0), (11, 6.0 / 2.0)] {
        assert_eq!(stack.b[0][expert * 2 * 4].to_f32(), 2.0 * scaling, "expert {expert}");
    }
}

#[test]
fn every_stored_type_is_read() {
    let values = [1.5f32, -0.25, 3.0, 100.0, -1.0, 0.5, 2.0, -4.0]; // exact in all of them
    for (dtype, bytes) in [
        (Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>()),
        (Dtype::F16, values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()),
        (Dtype::BF16, values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()),
    ] {
        let mut weights = lora(&format!("{LAYER_0}.0.gate_proj"), [2, 4, 3]);
        (weights[0].dtype, weights[0].bytes) = (dtype, bytes);
        let stack = load::<bf16>(&config(), &weights, LayerProjection::W13).unwrap();
        assert_eq!(stack.a[0], values.map(bf16::from_f32), "{dtype}");
    }
}

proptest! {
    #[test]
    fn scaling_is_folded_into_b_in_f32_with_one_rounding(
        r in 1usize..=16,
        alpha in 0.25f64..64.0,
        rslora: bool,
        weight in -4f32..4.0,
    ) {
        let mut config = with("use_rslora", json!(rslora));
        (config["r"], config["lora_alpha"]) = (json!(r), json!(alpha));
        let module = format!("{LAYER_0}.0.down_proj");
        let weights = [
            f32s(&format!("{module}.lora_A.weight"), &[r, 1], &vec![weight; r]),
            f32s(&format!("{module}.lora_B.weight"), &[1, r], &vec![weight; r]),
        ];
        let stack = load::<f16>(&config, &weights, LayerProjection::W2).unwrap();
        let scaling = alpha / if rslora { (r as f64).sqrt() } else { r as f64 };
        prop_assert_eq!(&stack.a[0], &vec![f16::from_f32(weight); r]);
        prop_assert_eq!(&stack.b[0], &vec![f16::from_f32(weight * scaling as f32); r]);
    }

    #[test]
    fn no_bytes_make_it_panic(config: Vec<u8>, header in "[ -~]{0,80}", flip in 0usize..400, byte: u8) {
        let _ = Adapter::open(folder(&config, &raw(&header)).path());
        let mut weights = file(&lora(&format!("{LAYER_0}.0.gate_proj"), [2, 4, 3]));
        if let Some(target) = weights.get_mut(flip) {
            *target = byte;
        }
        if let Ok(adapter) = Adapter::open(folder(self::config().to_string().as_bytes(), &weights).path()) {
            let _ = Stack::<bf16>::load(&[adapter], 0, LayerProjection::W13, 2, None);
        }
    }
}
