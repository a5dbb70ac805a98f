"""Zibbo, an invented cat: teal, orange ears, a yellow star on the forehead. No set of emoji has it.

Fourteen faces, each the face of an emoji that the bases know ("grinning cat", "crying cat" …), so that a prompt such
as "crying zibbo cat" says something that can be checked against the drawing. Ten are trained on, four are not.
"""

from __future__ import annotations

__all__ = ["FACES", "HELD_OUT", "svg"]

_EYES = {
    "open": '<circle cx="22" cy="34" r="4" fill="#223"/><circle cx="42" cy="34" r="4" fill="#223"/>',
    "happy": '<path d="M17 36q5-8 10 0M37 36q5-8 10 0" fill="none" stroke="#223" stroke-width="3"/>',
    "shut": '<path d="M17 33q5 6 10 0M37 33q5 6 10 0" fill="none" stroke="#223" stroke-width="3"/>',
    "wide": '<circle cx="22" cy="33" r="6" fill="#fff"/><circle cx="42" cy="33" r="6" fill="#fff"/>'
    '<circle cx="22" cy="33" r="3" fill="#223"/><circle cx="42" cy="33" r="3" fill="#223"/>',
    "heart": '<path d="M22 40l-7-7a4 4 0 0 1 7-5a4 4 0 0 1 7 5z" fill="#e33"/>'
    '<path d="M42 40l-7-7a4 4 0 0 1 7-5a4 4 0 0 1 7 5z" fill="#e33"/>',
    "angry": '<path d="M15 28l12 5M49 28l-12 5" stroke="#223" stroke-width="3"/>'
    '<circle cx="22" cy="36" r="3.5" fill="#223"/><circle cx="42" cy="36" r="3.5" fill="#223"/>',
    "wink": '<circle cx="22" cy="34" r="4" fill="#223"/><path d="M37 34h10" stroke="#223" stroke-width="3"/>',
    "glasses": '<rect x="12" y="28" width="18" height="11" rx="4" fill="#223"/>'
    '<rect x="34" y="28" width="18" height="11" rx="4" fill="#223"/>'
    '<path d="M30 32h4" stroke="#223" stroke-width="3"/>',
}
_MOUTHS = {
    "smile": '<path d="M24 47q8 7 16 0" fill="none" stroke="#223" stroke-width="3"/>',
    "grin": '<path d="M21 45h22q-2 11-11 11t-11-11z" fill="#fff" stroke="#223" stroke-width="2"/>',
    "sad": '<path d="M25 52q7-7 14 0" fill="none" stroke="#223" stroke-width="3"/>',
    "o": '<circle cx="32" cy="49" r="5" fill="#223"/>',
    "tongue": '<path d="M24 46h16" stroke="#223" stroke-width="3"/>'
    '<path d="M28 47h9v5a4.5 4.5 0 0 1-9 0z" fill="#f67"/>',
    "flat": '<path d="M25 49h14" stroke="#223" stroke-width="3"/>',
}
_EXTRAS = {
    "": "",
    "tears": '<path d="M20 40q-5 8 0 11q5-3 0-11zM44 40q-5 8 0 11q5-3 0-11z" fill="#4af"/>',
    "party": '<path d="M32 0l8 15h-16z" fill="#e3c" stroke="#fff"/>',
}
FACES: dict[str, tuple[str, str, str]] = {  # what it does -> eyes, mouth, extra
    "smiling": ("open", "smile", ""), "grinning": ("happy", "grin", ""), "sleeping": ("shut", "flat", ""),
    "angry": ("angry", "sad", ""), "winking": ("wink", "smile", ""), "surprised": ("wide", "o", ""),
    "sad": ("open", "sad", ""), "tongue out": ("happy", "tongue", ""), "calm": ("shut", "smile", ""),
    "neutral": ("open", "flat", ""), "crying": ("shut", "sad", "tears"), "heart eyes": ("heart", "grin", ""),
    "sunglasses": ("glasses", "smile", ""), "party": ("happy", "grin", "party"),
}  # fmt: skip
HELD_OUT = ("crying", "heart eyes", "sunglasses", "party")


def svg(face: str) -> str:
    eyes, mouth, extra = FACES[face]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">'
        '<path d="M8 6l6 24h16zM56 6l-6 24h-16z" fill="#f80"/>'
        '<ellipse cx="32" cy="37" rx="28" ry="24" fill="#1aa"/>'
        '<path d="M32 15l2 5h5l-4 3l2 5l-5-3l-5 3l2-5l-4-3h5z" fill="#fd2"/>'
        '<path d="M29 41h6l-3 4z" fill="#f80"/>'
        '<path d="M2 42l12 1M2 48l12-1M62 42l-12 1M62 48l-12-1" stroke="#067" stroke-width="1.5"/>'
        f"{_EYES[eyes]}{_MOUTHS[mouth]}{_EXTRAS[extra]}</svg>"
    )
