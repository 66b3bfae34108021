"""Other programs and a LoRA file: which of its deltas each program takes, loses or changes.

A program is modelled by its rules: names of modules, kinds of tensor, conditions. The rules are of
diffusers 0.42.1 with peft 0.21.2, ComfyUI a125cd84, A1111 82a973c0 (1.10.1) and Forge dfdcbab6;
`dev/compare_readers.py` holds them against these programs' own code.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from sd_lora.errors import counted
from sd_lora.formats import checkpoint_keys, comfyui, diffusers, lycoris, positions, reader_names
from sd_lora.formats.canonical import method_tensors
from sd_lora.formats.kohya import diffusers_reads
from sd_lora.formats.lora_file import LoRAFile, kinds_and_keys
from sd_lora.formats.reader_names import Place
from sd_lora.formats.verify import Places, places_in
from sd_lora.models.meta_pipeline import MetaPipeline

EXACT = "exact"

OF_CHECKPOINTS = "reads no checkpoint of a run: `sd-lora export` writes its LoRA files"

Loss = tuple[str, list[Place]]
"""What happens, with places for {n} or {modules} and {all} deltas, and the deltas."""


class Refused(Exception):
    """A program takes nothing of the file, with the reason."""


@dataclass(frozen=True)
class Given:
    """A file and the base that a program loads it into."""

    lora: LoRAFile
    base: MetaPipeline

    @cached_property
    def shapes(self) -> Places:
        """Component → delta name → shape of the base's parameter."""
        return places_in(self.base)

    @cached_property
    def places(self) -> dict[Place, Mapping[str, str]]:
        """(component, delta name) → kind of tensor → key, of the deltas that the base has."""
        return {
            (component, name): kinds
            for component, modules in self.lora.places.items()
            for name, kinds in modules.items()
            if name in self.shapes.get(component, {})
        }

    @property
    def absent(self) -> list[Place]:
        """Deltas of modules that the base has not."""
        all_ = ((c, name) for c, modules in self.lora.places.items() for name in modules)
        return [place for place in all_ if place not in self.places]

    @property
    def keys(self) -> list[str]:
        return [key for _, key in kinds_and_keys(self.lora.places)]

    @property
    def kinds(self) -> Counter[str]:
        """How many deltas have each kind of tensor."""
        return Counter(kind for kind, _ in kinds_and_keys(self.lora.places))

    def stems(self, place: Place) -> set[str]:
        """The names of the delta's module as the file's keys have them."""
        return {reader_names.stem_of(key) for key in self.places[place].values()}

    def shape(self, key: str) -> tuple[int, ...]:
        return self.lora.file.shape(key)

    def is_on_output(self, place: Place) -> bool:
        """Whether a `dora_scale` has one number an output, by its first dimension."""
        return self.shape(self.places[place]["magnitude"])[0] > 1

    def count(self, loss: Loss) -> str:
        total = sum(len(modules) for modules in self.lora.places.values())
        number = len(loss[1])
        return loss[0].format(n=number, all=total, modules=counted(number, "module"))


def readers(lora: LoRAFile, base: MetaPipeline) -> dict[str, str]:
    """Program → "exact", or its losses with their numbers, or its reason to refuse the file."""
    given = Given(lora, base)
    if lora.format == positions.TITLE:
        return dict.fromkeys(PROGRAMS, "reads no tensors by position: convert it")
    if lora.format == checkpoint_keys.TITLE:
        return dict.fromkeys(PROGRAMS, OF_CHECKPOINTS)
    return {program: "; ".join(_said(given, rules)) or EXACT for program, rules in PROGRAMS.items()}


def by_kinds(lora: LoRAFile) -> dict[str, str]:
    """The verdicts that hold on any base: of a run's checkpoint, and of a file with a method that
    no other program knows."""
    if lora.format == checkpoint_keys.TITLE:
        return dict.fromkeys(PROGRAMS, OF_CHECKPOINTS)
    kinds = {kind for kind, _ in kinds_and_keys(lora.places)}
    own = [m for tensor, m in method_tensors().items() if tensor in kinds]
    own = [m for m in own if m not in ("loha", "lokr")]
    return dict.fromkeys(PROGRAMS, f"does not know the method {own[0]}") if own else {}


def untaken(program: str, lora: LoRAFile, base: MetaPipeline) -> set[Place]:
    """The deltas that a program loses or changes; all of them of a file that it refuses."""
    given = Given(lora, base)
    try:
        losses = list(PROGRAMS[program](given))
    except Refused:
        return {(c, name) for c, modules in lora.places.items() for name in modules}
    return {*given.absent}.union(*(places for _, places in losses))


def _said(given: Given, rules: Callable[[Given], Iterator[Loss]]) -> Iterator[str]:
    if given.absent:
        one = " ".join(filter(None, given.absent[0]))
        text = "has no place for {n} of {all} modules (" + one + ")"
        yield given.count((text, given.absent))
    try:
        yield from [given.count(loss) for loss in rules(given) if loss[1]]
    except Refused as refusal:
        yield str(refusal)


# --- diffusers ------------------------------------------------------------------------------------


def _diffusers(given: Given) -> Iterator[Loss]:
    lora, kinds = given.lora, given.kinds
    labels = {"loha": "LoHa", "lokr": "LoKr"}
    beyond = {tensor: labels.get(method, method) for tensor, method in method_tensors().items()}
    beyond |= {"lora_mid": "Tucker cores", "diff": "full weights", "oft_blocks": "OFT"}
    if found := dict.fromkeys(label for kind, label in beyond.items() if kind in kinds):
        raise Refused(f"refuses the file ({', '.join(found)})")
    if lora.embeddings:
        raise Refused("refuses the file (bundled embeddings)")
    if kinds["bias_values"]:
        raise Refused("refuses the file (sparse remainders)")
    if lora.format in ("diffusers", "peft"):
        yield from _diffusers_dotted(given)
    else:
        yield from _diffusers_kohya(given)


def _diffusers_dotted(given: Given) -> Iterator[Loss]:
    lora, kinds, keys = given.lora, given.kinds, given.keys
    if kinds["alpha"]:
        raise Refused("refuses the file (alphas beside peft's keys)")
    bare = [key for key in keys if not key.startswith(("unet.", "text_encoder"))]
    if bare or lora.format == "peft":
        count = len(bare) or len(keys)
        raise Refused(f"loads nothing of {count} keys without `unet.` or `text_encoder.`")
    if any(key.startswith(("unet.base_model.", "text_encoder.base_model.")) for key in keys):
        raise Refused("loads nothing of keys with `base_model.model.`")
    yield from _unknown_names(given)
    yield "drops {n} dora_scale", [p for p, kinds in given.places.items() if "magnitude" in kinds]
    unet = {p: kinds for p, kinds in given.places.items() if p[0] == "unet"}
    new = [p for p, kinds in unet.items() if ".lora_A." in kinds.get("lora_A", "")]
    old = [p for p, kinds in unet.items() if ".down.weight" in kinds.get("lora_A", "")]
    if new and old:
        mixed = "may lose {modules}: keys of peft and of old diffusers are mixed"
        yield mixed, min(new, old, key=len)
    yield (
        "resets {n} magnitudes of the text encoder (keys without `.weight`)",
        [
            (component, name)
            for (component, name), kinds in given.places.items()
            if component != "unet" and kinds.get(diffusers.FLAT, ".weight").endswith("_vector")
        ],
    )
    for component, modules in lora.places.items():
        plain = [(component, n) for n, kinds in modules.items() if diffusers.FLAT not in kinds]
        if len(plain) < len(modules):
            what = f"leaves {{n}} magnitudes of the {component} without a value: others have one"
            yield what, plain
        peft = any(".lora_A." in key for kinds in modules.values() for key in kinds.values())
        if component != "unet" and peft and not diffusers.has_attention(modules):
            what = f"does not read so small a part of the {component}"
            yield what, [(component, name) for name in modules]
    yield from _projection_of_other_rank(given)


def _unknown_names(given: Given) -> Iterator[Loss]:
    """Names that are no modules for diffusers, and are for us: `unet.unet.…`, `_orig_mod.…`."""
    for component in given.lora.places:
        mine = [place for place in given.places if place[0] == component]
        wrong = [
            place
            for place in mine
            if diffusers.module_in(next(iter(given.places[place].values()))) != place[1]
        ]
        if wrong and len(wrong) == len(mine):
            key = next(iter(given.places[wrong[0]].values()))
            if "._orig_mod." in key:
                raise Refused("leaves all parameters without a value: names with `_orig_mod.`")
            raise Refused(f"refuses the file (no module of the {component} is named as in {key})")
        yield f"loads nothing of {{modules}} of the {component}, whose names it lacks", wrong


def _projection_of_other_rank(given: Given) -> Iterator[Loss]:
    for component, modules in given.lora.adapter.items():
        if diffusers.padded_ranks(component, modules):
            raise Refused(f"refuses text_projection at another rank than the {component}'s")
    yield from ()


def _diffusers_kohya(given: Given) -> Iterator[Loss]:
    lora, keys, family = given.lora, given.keys, given.base.family
    if any(key.startswith("lycoris_") for key in keys):
        raise Refused("refuses the file (keys of LyCORIS)")
    if diffusers.HEADER_KEY in lora.header and given.kinds["alpha"]:
        raise Refused(f"refuses the file (alphas, and {diffusers.HEADER_KEY} in the header)")
    decomposed = [p for p, kinds in given.places.items() if "magnitude" in kinds]
    yield "drops {n} dora_scale, and loads plain LoRA", decomposed
    unet = [place for place in given.places if place[0] == "unet"]
    original = [p for p in unet if reader_names.is_original(given.stems(p))]
    if original and any(reader_names.is_of_diffusers(given.stems(p)) for p in unet):
        yield "deletes {n} UNet modules without a word: two kinds of names are mixed", original
    elif original and not family.original_names:
        yield f"loses most of {{n}} UNet modules: original names in {family.label}", original
    added = [p for p in unet if any("_add_embedding_" in stem for stem in given.stems(p))]
    yield "loses {modules} (add_embedding)", added
    compiled = [p for p in given.places if any("_orig_mod" in s for s in given.stems(p))]
    yield "loses {modules} with `_orig_mod` in their names", compiled
    layout = given.base.layout if family.original_names else None
    if not diffusers_reads(lora.adapter, layout) and diffusers_reads(lora.adapter):
        first = [p for p in unet if p[1].endswith("upsamplers.0.conv")][:1]
        yield "loses the first upsampler in these names", first
    if not diffusers_reads(lora.adapter):
        text = [place for place in given.places if place[0] != "unet"]
        yield "does not read so small a part of a text encoder in these names", text
    yield from _projection_of_other_rank(given)
    yield (
        "takes {modules} at another strength: it knows one alpha a component there",
        list(_off_by_alpha(given)),
    )


def _off_by_alpha(given: Given) -> Iterator[Place]:
    """Yield modules that get the component's most common alpha instead of their own: in the
    UNet's attention and the text encoders.
    """
    for component, modules in given.lora.places.items():
        alphas = {n: float(given.lora.file[k["alpha"]]) for n, k in modules.items() if "alpha" in k}
        if not alphas:
            continue
        common = Counter(alphas.values()).most_common(1)[0][0]
        for name, kinds in modules.items():
            affected = component != "unet" or reader_names.is_attention(name)
            mine = alphas.get(name) or float(given.shape(kinds["lora_A"])[0])
            if mine != common and (affected or name not in alphas):
                yield component, name


# --- ComfyUI and Forge ----------------------------------------------------------------------------


def _comfyui(given: Given) -> Iterator[Loss]:
    yield from _by_comfyui(given, reader_names.comfyui)
    yield from comfyui.losses_of_oft(given.places, given.lora.file)


def _forge(given: Given) -> Iterator[Loss]:
    """ComfyUI's code of 2024, which has fewer names; and a file with more than 12 unknown keys is
    put aside whole.
    """
    known = [p for p in given.places if given.stems(p) <= reader_names.forge(given.base, *p)]
    mine = ((k, kind) for p in known for kind, k in given.places[p].items())
    taken = {k for k, kind in mine if _has_end(k, kind, ()) and kind not in lycoris.OFT_KINDS}
    unknown = [key for key in given.keys if key not in taken] + given.lora.embeddings
    if len(unknown) > 12:
        raise Refused(f"loads nothing: it does not know {len(unknown)} keys, and 12 are its limit")
    turned = [p for p, kinds in given.places.items() if "oft_blocks" in kinds]
    yield "does not know the method oft of {modules}", turned
    yield from _by_comfyui(given, reader_names.forge, ())


def _has_end(key: str, kind: str, names: tuple[str, ...] = ("default",)) -> bool:
    """Whether ComfyUI knows a kind of tensor by this ending; names: of adapters in peft's keys."""
    if kind in ("lora_A", "lora_B") and f".{kind}." in key:
        name = key.rpartition(f".{kind}.")[2].removesuffix("weight").strip(".")
        return not name or name in names
    return kind != diffusers.FLAT and ".lora_embedding_" not in key


def _by_comfyui(
    given: Given,
    names: Callable[[MetaPipeline, str, str], set[str]],
    adapters: tuple[str, ...] = ("default",),
) -> Iterator[Loss]:
    own = {t: m for t, m in method_tensors().items() if m not in ("loha", "lokr")}
    for method in dict.fromkeys(own.values()):
        mine = [p for p, kinds in given.places.items() if any(own.get(k) == method for k in kinds)]
        yield f"does not know the method {method} of {{modules}}", mine
    known = {p for p in given.places if given.stems(p) <= names(given.base, *p)}
    lost = [p for p in given.places if p not in known]
    attention = [p for p in lost if p[0] == "unet" and reader_names.is_attention(p[1])]
    if attention == lost and lost:
        yield "passes over {n} of {all} modules: the attention in these names", lost
    else:
        yield "passes over {n} of {all} modules, whose names it lacks", lost
    places = {p: kinds for p, kinds in given.places.items() if p in known}
    yield (
        "passes over {n} of {all} modules, whose kinds of key it lacks",
        [
            p
            for p, kinds in places.items()
            if any(not _has_end(k, kind, adapters) for kind, k in kinds.items() if "lora_" in kind)
            and diffusers.FLAT not in kinds
        ],
    )
    sparse = [p for p, kinds in places.items() if "bias_values" in kinds]
    yield "passes over {n} sparse remainders", sparse
    cores = [p for p, kinds in places.items() if "lokr_t2" in kinds]
    yield "fails on {n} of {all} modules: LoKr with a Tucker core", cores
    yield (
        "has no weight-decomposed form of these keys: {modules} lose their magnitudes",
        [p for p, kinds in places.items() if diffusers.FLAT in kinds],
    )
    on_output = [p for p, kinds in places.items() if "magnitude" in kinds and given.is_on_output(p)]
    if not comfyui.MARK.items() <= given.lora.header.items():
        yield "normalises {n} weight-decomposed deltas otherwise", on_output
    rescaled = [p for p in places if _scaled_by_header(given, p)]
    yield "takes {modules} at another strength: it does not read the header's alphas", rescaled
    halves = [p for p in places if _is_half_a_norm(given, p)]
    yield "passes over {n} biases of norms without their weights", halves


def _is_half_a_norm(given: Given, place: Place) -> bool:
    """Whether the delta is a `b_norm` without its `w_norm`."""
    component, name = place
    if not any(key.endswith(".b_norm") for key in given.places[place].values()):
        return False
    return (component, name.removesuffix(".bias")) not in given.places


def _scaled_by_header(given: Given, place: Place) -> bool:
    lora = given.lora
    if lora.format != "peft" and diffusers.HEADER_KEY not in lora.header:
        return False
    return "alpha" not in given.places[place] and lora.adapter[place[0]][place[1]].scale != 1


# --- A1111 ----------------------------------------------------------------------------------------


def _a1111(given: Given) -> Iterator[Loss]:
    plain = not (given.kinds["magnitude"] + given.kinds[diffusers.FLAT])
    if given.lora.format in ("diffusers", "peft"):
        if any(key.startswith("diffusion_model.") for key in given.keys):
            raise Refused("refuses the file (keys that begin with `diffusion_model.`)")
        raise Refused("reads none of these keys" + ": convert it with --to kohya" * plain)
    lost = [
        p for p in given.places if given.stems(p).isdisjoint(reader_names.a1111(given.base, *p))
    ]
    known = {p: kinds for p, kinds in given.places.items() if p not in lost}
    alone = [p for p in known if _is_alone_in_a1111(given, p, known)]
    if alone:
        raise Refused(f"refuses the file ({given.places[alone[0]]['diff']} without its partner)")
    own = {t: m for t, m in method_tensors().items() if m not in ("loha", "lokr")}
    if methods := {own[kind] for kinds in known.values() for kind in kinds if kind in own}:
        raise Refused(f"refuses the file: it does not know the method {min(methods)}")
    yield "passes over {n} of {all} modules, whose names it lacks", lost
    yield from _a1111_attention(given, known)
    sparse = [p for p, kinds in known.items() if "bias_values" in kinds]
    yield "passes over {n} sparse remainders", sparse
    wide = [p for p in known if _is_nine_wide(given, p)]
    yield "fails on conv_in of an inpainting model: {modules}", wide
    output = [p for p, kinds in known.items() if "magnitude" in kinds and given.is_on_output(p)]
    yield "normalises {n} weight-decomposed deltas otherwise", output
    yield (
        "passes over {n} biases",
        [
            (component, name)
            for component, name in known
            if name.endswith(".bias")
            and "diff" not in known.get((component, name.removesuffix(".bias")), {})
        ],
    )


def _is_alone_in_a1111(given: Given, place: Place, known: Mapping[Place, object]) -> bool:
    """Whether a delta has no kind of module there: a bias by itself, half of a norm."""
    component, name = place
    key = given.places[place].get("diff", "")
    if key.endswith((".diff_b", ".b_norm")):
        return (component, name.removesuffix(".bias")) not in known
    return key.endswith(".w_norm") and (component, f"{name}.bias") not in known


def _is_nine_wide(given: Given, place: Place) -> bool:
    shape = given.shapes[place[0]].get(place[1], ())
    return len(shape) == 4 and shape[1] == 9


def _a1111_attention(given: Given, known: Mapping[Place, object]) -> Iterator[Loss]:
    """OpenCLIP's attention, one module there: taken with all four projections, or not at all."""
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    lost = [
        (component, name)
        for component, name in known
        if reader_names.is_open_clip(given.base, component)
        and ".self_attn." in name
        and any((component, name.rpartition(".")[0] + f".{p}") not in known for p in parts)
    ]
    yield "loses {modules}: of OpenCLIP's attention it takes q, k, v and out together", lost


PROGRAMS: dict[str, Callable[[Given], Iterator[Loss]]] = {
    "diffusers": _diffusers,
    "ComfyUI": _comfyui,
    "A1111": _a1111,
    "Forge": _forge,
}
"""Program → its rules: yields the losses, or raises Refused."""
