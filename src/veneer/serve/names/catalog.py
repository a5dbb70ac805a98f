"""The names of one server, and the adapters that the names refer to.

    sources = AdapterSources(base, library=open_library())
    engine = TextEngine(base, sources.read)
    catalog = Catalog(sources, engine.problems, engine.residents, routes=…)
    served = catalog.resolve("support@prod", principal)

A name is looked up in this order: the base's name; a route (`routes`); a loaded name; a library reference
(`support`, `support@2`, `support@prod`, `sha256:…`). Each name can have the prefix `base:`.
`ft:base:acme:support:id` is OpenAI's form of a name (see library/names.py). An unknown name and a name that
the principal cannot see give the same 404; the latter is refused before any lookup.

Names from clients never reach the file system: they are compared with known names and looked up in the
library's index. `load` fully checks an adapter before the adapter's name becomes visible. Any other library
adapter is checked by the same rules on its first request, outside the engine's thread. Only the check for
another base needs no files, because the index has each adapter's base.
"""

from __future__ import annotations

import calendar
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.adapters.use import AnyBase
from veneer.core.adapter import Adapter
from veneer.errors import ConfigError, quoted
from veneer.library.names import check_name, name_of, parse_tuned
from veneer.serve.access import ModelCard, ResolvedModel, Routes
from veneer.serve.names.adapter_cache import AdapterCache, ResidentAdapter
from veneer.serve.names.adapter_sources import AdapterSources, Problems, location_of, unusable
from veneer.serve.principal import Principal
from veneer.serve.request import DigestMix, Refused, check_strengths, invalid, make_mix, not_ready, served_digest

_MAX_NAME = 200
MAX_MIX = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Meaning:
    """The result of resolving a client's name.

    `target`: the adapter's name; for a route, the name that the route chose. `digest`: the adapter's digest.
    `operator_name`: the operator's name for the adapter. Both are "" for the base.
    """

    target: str
    digest: str = ""
    operator_name: str = ""
    routed: bool = False


class NoAdapters:
    """A stand-in for the adapter cache while the base is still loading."""

    def load(self, digest: str, adapter: Adapter | None = None) -> None:
        raise not_ready("loading")

    def drop(self, digest: str) -> None: ...

    def resident(self) -> dict[str, ResidentAdapter]:
        return {}


class Catalog:
    """A server's names: resolves them, and loads and unloads adapters.

    `problems`: see `Problems`. `memory`: the cache of loaded adapters. `name`: the name under which the base
    is served; by default the last part of the base's own name. Thread-safe; only `load` and `check` read
    files.

    Raises Refused: model_not_found (404), adapter_exists (400), adapter_unusable (see `AdapterSources`).
    """

    def __init__(
        self,
        sources: AdapterSources,
        problems: Problems,
        memory: AdapterCache[Any] | NoAdapters,
        *,
        name: str = "",
        routes: Routes | None = None,
    ) -> None:
        self.base = name or sources.base.name.rstrip("/").rpartition("/")[2]
        self.sources, self.problems, self.residents, self.routes = sources, problems, memory, routes
        self._started = int(time.time())
        self._lock = threading.Lock()
        self._reading = threading.Semaphore(2)  # limits the memory of concurrent loads
        self._loaded: dict[str, ModelCard] = {}
        self._served: dict[str, ModelCard] = {}
        """Digest -> card under the name that a server with an upstream sends; only adapters in memory are used."""
        self._library_models: tuple[object, dict[str, ModelCard]] = (None, {})

    @property
    def fingerprint(self) -> str:
        """The base's fingerprint."""
        return self.sources.base.fingerprint

    def use_base(self, base: AnyBase, problems: Problems, memory: AdapterCache[Any] | NoAdapters) -> None:
        """Start to serve a base that has just been loaded."""
        self.sources.base, self.problems, self.residents = base, problems, memory
        self._library_models = (None, {})

    # -- resolving names -----------------------------------------------------------------------------------------------

    def resolve(self, model: str, principal: Principal) -> ResolvedModel:
        """Resolve a client's model name for a principal.

        `model`: the name of the base ("" also means the base), of an adapter or of a route, or a library
        reference; each can have the prefix `base:`.
        """
        meaning = self._resolve_name(model, principal)
        shadow: tuple[str, DigestMix | Refused] | None = None
        routes = self.routes if meaning.routed else None
        if routes is not None and (shadow_name := routes.shadow(self._without_base(model), principal)):
            try:
                shadow = (shadow_name, _single_mix(self._adapter(shadow_name, shadow_name)))
            except Refused as error:
                shadow = (shadow_name, error)
                _log.warning("the shadow %r of %r cannot be served: %s", shadow_name, model, error.what)
        adapters = (meaning.operator_name,) if meaning.operator_name else ()
        return ResolvedModel(_single_mix(meaning), model or self.base, meaning.target, shadow, adapters)

    def resolve_mix(self, parts: Sequence[tuple[str, float]], principal: Principal) -> ResolvedModel:
        """Resolve a mix of (name, strength); strengths of the same adapter are added."""
        if len(parts) > MAX_MIX:
            raise invalid(f"a mix of {len(parts)} adapters; at most {MAX_MIX}", "mix")
        meanings = [(self._resolve_name(word, principal), strength) for word, strength in parts]
        mix = make_mix([(meaning.digest, strength) for meaning, strength in meanings if meaning.digest])
        same = [[m for m, _ in meanings if m.digest == digest] for digest, _ in mix]
        adapters = tuple(min(m.operator_name for m in names) for names in same)  # one of the adapter's names
        check_strengths(zip(adapters, (strength for _, strength in mix), strict=True))  # the added strengths
        name = "+".join(f"{word}:{strength:g}" for word, strength in parts) or self.base
        target = name if len(mix) > 1 else same[0][0].target if same else self.base
        return ResolvedModel(mix, name, target, adapters=adapters, digests=tuple(m.digest for m, _ in meanings))

    def _without_base(self, model: str) -> str:
        """Return a name without the `base:` prefix.

        For OpenAI's form `ft:base:…`, returns the library reference.
        """
        word = model.removeprefix(f"{self.base}:") or self.base
        tuned = parse_tuned(word)
        if tuned is None:
            return word
        if tuned.base != self.base:
            raise _missing(model)
        return tuned.reference

    def _resolve_name(self, model: str, principal: Principal) -> _Meaning:
        """Resolve a client's name. Raises Refused (404, or `unusable`)."""
        word = self._without_base(model)
        if word == self.base:
            return _Meaning(word)
        if len(word) > _MAX_NAME or not word.isprintable():
            raise _missing(model)
        target = self.routes.choose(word, principal) if self.routes is not None else None
        if target is None and not principal.sees(word) and not principal.sees(name_of(word)):
            raise _missing(model)
        return replace(self._adapter(target or word, model), routed=target is not None)

    def _adapter(self, name: str, model: str) -> _Meaning:
        """Resolve an adapter's name. Raises Refused.

        `model`: the client's name, for error messages.
        """
        if name == self.base:
            return _Meaning(name)
        loaded = self._loaded.get(name)
        if loaded is not None:
            return _Meaning(name, loaded.digest, name)
        version = self.sources.find_version(served_digest(name) or name)
        if version is None:
            raise _missing(model)
        if not version.digest:
            raise unusable("corrupt", f"{quoted(name)} could not be read when it was added to the library")
        if version.fingerprint not in ("", self.fingerprint):
            raise unusable("wrong_base", f"{quoted(name)} belongs to {version.base or version.fingerprint}")
        self.sources.keep(version.digest, location_of(version))
        if name.startswith("veneer-") and version.digest not in self._served and served_digest(name):
            card = ModelCard(name, version.reference, self.base, _seconds(version.added), version.digest)
            resident = self.residents.resident()
            self._served = {d: c for d, c in self._served.items() if d in resident} | {version.digest: card}
        return _Meaning(name, version.digest, version.reference)

    def check(self, name: str) -> None:
        """Check that a name can be served, by reading its adapter unless it is loaded.

        Raises the same Refused as the first request for the name would.
        """
        self.sources.find_version(name, sure=True)
        meaning = self._adapter(name, name)
        if meaning.digest and name not in self._loaded:
            self.sources.read(meaning.digest, self.problems)

    def models(self, principal: Principal) -> list[ModelCard]:
        """Return the cards of all models that the principal can see.

        The base comes first, then loaded and library adapters, then routes.
        """
        resident = self.residents.resident() if self._served else {}
        served = {card.id: card for card in self._served.values() if card.digest in resident}
        cards = self._library_cards() | self._loaded | served
        out = [ModelCard(self.base, self.base, None, self._started)]
        out += [card for name, card in sorted(cards.items()) if principal.sees(name)]
        for route in self.routes.names(principal) if self.routes is not None else []:
            if route not in cards:
                out.append(ModelCard(route, route, self.base, self._started))
        return out

    def card(self, model: str, principal: Principal) -> ModelCard:
        """Return the card of one model. `model` can be an OpenAI name, `ft:base:…`."""
        if parse_tuned(model) is not None:
            meaning = self._resolve_name(model, principal)
            version = self.sources.find_version(self._without_base(model))
            if meaning.digest and version is not None:
                return ModelCard(model, meaning.operator_name, self.base, _seconds(version.added), meaning.digest)
        if model == self.base:
            return ModelCard(self.base, self.base, None, self._started)
        found = self._loaded.get(model) or self._library_cards().get(model)
        if found is not None and principal.sees(model):
            return found
        if found is None and self.routes is not None and model in self.routes.names(principal):
            return ModelCard(model, model, self.base, self._started)
        raise _missing(model)

    def _library_cards(self) -> dict[str, ModelCard]:
        """Return name -> card of the library's adapters; renewed when the library's names change."""
        now = None if self.sources.names is None else self.sources.names.now
        if self._library_models[0] is not now:
            versions = self.sources.latest_versions(self.fingerprint)
            cards = [ModelCard(v.name, v.reference, self.base, _seconds(v.added), v.digest, v.size) for v in versions]
            self._library_models = (now, {card.id: card for card in cards})
        return self._library_models[1]

    def in_memory(self) -> list[tuple[str, ResidentAdapter]]:
        """Return (name, adapter) of each adapter in memory, most recently used first."""
        named = {card.digest: card.id for card in [*self._served.values(), *self._loaded.values()]}
        adapters = []
        for each in reversed(self.residents.resident().values()):
            version = None if each.digest in named else self.sources.find_version(each.digest)
            adapters.append((named.get(each.digest) or (version.reference if version else each.digest), each))
        return adapters

    def loaded_names(self) -> list[str]:
        """Return the names that `load` has added."""
        return sorted(self._loaded)

    async def fresh(self) -> None:
        """Wait until current names are visible; each HTTP request calls this once.

        If the library's index does not respond soon, its last known state is used.
        """
        await self.sources.fresh()

    def close(self) -> None:
        """Stop the thread that reads the library's names."""
        self.sources.close()

    # -- loading ------------------------------------------------------------------------------------------------------

    def load(self, name: str, source: str, *, replace: bool = False) -> ModelCard:
        """Read an adapter, check it against the base and keep it in memory.

        Blocking: call in a thread. If the load is refused, nothing changes. With `replace`, the name switches
        to the new weights between two requests; running requests keep the old weights until they end.
        `source`: a library reference, or a path inside the operator's allowed folders.
        """
        try:
            check_name(name, cased=True)
            if name == self.base:
                raise ConfigError(f"{quoted(name)} is the name of the base", fix="another name")
        except ConfigError as error:
            raise invalid(error.what, "lora_name", error.fix) from None
        self._check_free(name, replace)
        location = self.sources.locate(source)
        with self._reading:
            adapter = self.sources.read_from(location, self.problems)
            digest = adapter.digest()
            self._check_library(name, digest, replace)
            self.sources.keep(digest, location)
            try:
                self.residents.load(digest, adapter)
            except BaseException:
                self._forget(digest)
                raise
        card = ModelCard(name, location.root, self.base, int(time.time()), digest, adapter.size_bytes())
        with self._lock:
            old = self._loaded.get(name)
            taken = old is not None and not replace
            if not taken:
                self._loaded[name] = card
        if taken:
            self._forget(digest)
            self._check_free(name, replace)
        if old is not None:
            self._forget(old.digest)
        return card

    def unload(self, name: str) -> None:
        """Remove a name at once.

        The adapter's memory is freed once no other name and no running request uses the adapter.
        """
        with self._lock:
            card = self._loaded.pop(name, None)
        if card is None:
            raise _missing(name)
        self._forget(card.digest)

    def _check_free(self, name: str, replace: bool) -> None:
        if name in self._loaded and not replace:
            message = f"The lora adapter '{name}' has already been loaded. "  # as in vLLM
            message += "If you want to load the adapter in place, set 'load_inplace' to True."
            raise Refused(message, status=400, code="adapter_exists", param="lora_name")

    def _check_library(self, name: str, digest: str, replace: bool) -> None:
        """Raise Refused if the name would hide a different library adapter, unless `replace`."""
        version = self.sources.find_version(name, sure=True)
        if version is None or version.digest == digest:
            return
        if not replace:
            message = f"the library has another adapter named {quoted(name)}, which requests could no longer reach"
            fix = "use another name, or set load_inplace"
            raise Refused(message, status=400, code="adapter_exists", param="lora_name", fix=fix)
        _log.warning("%r now names the loaded adapter instead of the library's %s", name, version.reference)

    def _forget(self, digest: str) -> None:
        """Free an adapter, unless a loaded name still refers to it."""
        with self._lock:
            used = any(card.digest == digest for card in self._loaded.values())
        if not used:
            self.residents.drop(digest)


def _single_mix(meaning: _Meaning) -> DigestMix:
    return ((meaning.digest, 1.0),) if meaning.digest else ()


def _missing(model: str) -> Refused:
    message = f"The model {quoted(model)} does not exist."
    fix = "GET /v1/fine_tuning/jobs shows the job that trains this model" if parse_tuned(model) is not None else None
    return Refused(message, status=404, code="model_not_found", param="model", fix=fix)


def _seconds(added: str) -> int:
    """Convert a library time, such as 2026-11-25T10:00:00Z, to seconds since 1970.

    Returns 0 for a malformed time, which a record in the store can contain.
    """
    try:
        return calendar.timegm(time.strptime(added, "%Y-%m-%dT%H:%M:%SZ"))
    except ValueError:
        return 0
