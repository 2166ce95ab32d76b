"""Language codes as data sets write them, brought to ISO 639-1 so that languages line up across tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from distillabse.errors import InputError

# ISO 639-1 and 639-3 of the languages that LaBSE was trained on and of their neighbours.
_CODES = """
af afr  am amh  ar ara  as asm  az aze  be bel  bg bul  bn ben  bo bod  br bre  bs bos  ca cat  co cos  cs ces  cy cym
da dan  de deu  el ell  en eng  eo epo  es spa  et est  eu eus  fa fas  fi fin  fo fao  fr fra  fy fry  ga gle  gd gla
gl glg  gu guj  ha hau  he heb  hi hin  hr hrv  ht hat  hu hun  hy hye  ia ina  id ind  ig ibo  is isl  it ita  ja jpn
jv jav  ka kat  kk kaz  km khm  kn kan  ko kor  ku kur  ky kir  la lat  lb ltz  lo lao  lt lit  lv lav  mg mlg  mi mri
mk mkd  ml mal  mn mon  mr mar  ms msa  mt mlt  my mya  nb nob  ne nep  nl nld  nn nno  no nor  ny nya  oc oci  or ori
pa pan  pl pol  ps pus  pt por  ro ron  ru rus  rw kin  sd snd  si sin  sk slk  sl slv  sm smo  sn sna  so som  sq sqi
sr srp  st sot  su sun  sv swe  sw swa  ta tam  te tel  tg tgk  th tha  tk tuk  tl tgl  tr tur  tt tat  ug uig  uk ukr
ur urd  uz uzb  vi vie  wo wol  xh xho  yi yid  yo yor  zh zho  zu zul
"""
# Members of macrolanguages, as Tatoeba, NTREX and FLORES name them, and codes of old that are still in use.
_MEMBERS = {
    "arb": "ar", "azj": "az", "cmn": "zh", "ekk": "et", "pes": "fa", "fil": "tl", "iw": "he", "khk": "mn", "lvs": "lv",
    "npi": "ne", "ory": "or", "pbt": "ps", "als": "sq", "swh": "sw", "plt": "mg", "uzn": "uz", "ydd": "yi", "zsm": "ms",
    "kmr": "ku", "quy": "qu",
}  # fmt: skip
_FIELDS = _CODES.split()
_TO_ISO_639_1 = {code: code for code in _FIELDS[::2]} | dict(zip(_FIELDS[1::2], _FIELDS[::2], strict=True)) | _MEMBERS


def iso_639_1(code: str) -> str | None:
    """The ISO 639-1 code of `deu`, `zho-CN`, `arb_Arab` or `de`; None for a code that is not known."""
    return _TO_ISO_639_1.get(_subtags(code)[0].lower())


def labels(codes: Iterable[str], origin: str) -> dict[str, str]:
    """ISO 639-1 codes by the codes of a file; two codes of one language keep what tells them apart: zh-Hans, zh-Hant.

    Raises:
        InputError: a code is not known; names it and `origin`.
    """
    found = dict.fromkeys(codes)
    unknown = [code for code in found if iso_639_1(code) is None]
    if unknown:
        raise InputError(
            f"{origin}: unknown language {', '.join(map(repr, unknown))}. Languages are ISO 639-1 or 639-3 codes, with "
            "or without a script or region: de, deu, zho_Hans."
        )
    short = {code: str(iso_639_1(code)) for code in found}
    count = Counter(short.values())
    return {code: iso if count[iso] == 1 else "-".join([iso, *_subtags(code)[1:]]) for code, iso in short.items()}


def select(found: Iterable[str], wanted: list[str] | None, origin: str) -> dict[str, str]:
    """Labels of the codes in a file that are asked for, sorted by label; all of them by default.

    Args:
        found: Codes as the file has them.
        wanted: Codes in any form; one without script or region stands for all of that language.
        origin: Who asks, for errors.

    Raises:
        InputError: a code is not known, two codes cannot be told apart, or a wanted language is not in the file.
    """
    named = labels(found, origin)
    if len(set(named.values())) < len(named):
        raise InputError(f"{origin}: {', '.join(named)} hold two names of one language. Keep one of them.")
    if wanted is not None:
        missing = [code for code in wanted if not any(_covers(code, other) for other in named)]
        if missing:
            raise InputError(
                f"{origin}: no rows in {', '.join(map(repr, missing))}. Languages found: {', '.join(sorted(named))}."
            )
        named = {code: label for code, label in named.items() if any(_covers(other, code) for other in wanted)}
    return dict(sorted(named.items(), key=lambda item: item[1]))


def _covers(wanted: str, code: str) -> bool:
    iso, rest = iso_639_1(wanted), _subtags(wanted)[1:]
    return iso is not None and iso == iso_639_1(code) and (not rest or rest == _subtags(code)[1:])


def _subtags(code: str) -> list[str]:
    return code.replace("_", "-").split("-")
