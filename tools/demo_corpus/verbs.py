"""The verbs, with what they take as subject and object, and their irregular forms.

Left out: suivre, whose "je suis" is also être's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tools.demo_corpus.lexicon import GOODS, HUMAN
from tools.demo_corpus.morphology import future_forms, future_stem, participle, present_forms, regular_past


@dataclass(frozen=True)
class Verb:
    """A French verb and its English equivalent, a base form such as "look for".

    `objects` are the kinds of nouns it takes (none: intransitive). `animate` verbs also take animals as subjects. A
    verb that is not `completed` has no passé composé here; a `pointed` one only takes objects that are singled out
    (the, this, my), since a plain plural would be read as general.
    """

    infinitive: str
    english: str
    english_past: str
    objects: tuple[str, ...]
    present: tuple[str, ...]
    future: tuple[str, ...]
    participle: str
    with_etre: bool
    animate: bool
    completed: bool
    pointed: bool
    imperfect: tuple[str, ...] = ()


def _verb(
    infinitive: str,
    english: str,
    past: str = "",
    objects: tuple[str, ...] = (),
    *,
    strong: str = "",
    present: str = "",
    future: str = "",
    done: str = "",
    with_etre: bool = False,
    animate: bool = False,
    completed: bool = True,
    pointed: bool = False,
    imperfect: str = "",
) -> Verb:
    return Verb(
        infinitive,
        english,
        past or regular_past(english),
        objects,
        tuple(present.split()) or present_forms(infinitive, strong),
        future_forms(future or future_stem(infinitive, strong)),
        done or participle(infinitive),
        with_etre,
        animate,
        completed,
        pointed,
        tuple(imperfect.split()),
    )


ETRE = _verb(
    "être", "be", "was", present="suis es est sommes êtes sont", future="ser", done="été", completed=False,
    imperfect="étais étais était étions étiez étaient",
)  # fmt: skip
AVOIR = _verb(
    "avoir", "have", "had", ("animal", *GOODS), present="ai as a avons avez ont", future="aur", done="eu",
    completed=False, imperfect="avais avais avait avions aviez avaient",
)  # fmt: skip
ALLER = _verb(
    "aller", "go", "went", present="vais vas va allons allez vont", future="ir", with_etre=True, animate=True
)  # fmt: skip
VENIR = _verb(
    "venir", "come", "came", present="viens viens vient venons venez viennent", future="viendr", done="venu",
    with_etre=True, animate=True,
)  # fmt: skip
VOULOIR = _verb(
    "vouloir", "want", "", ("animal", "food", "staple", "drink", *GOODS), done="voulu", future="voudr",
    present="veux veux veut voulons voulez veulent", completed=False,
)  # fmt: skip
POUVOIR = _verb(
    "pouvoir", "can", present="peux peux peut pouvons pouvez peuvent", future="pourr", done="pu", completed=False
)
DEVOIR = _verb(
    "devoir", "must", present="dois dois doit devons devez doivent", future="devr", done="dû", completed=False
)
# aller + infinitive: "il va dormir" is "he is going to sleep".
GOING_TO = replace(ALLER, english="be", english_past="was")

JOUER = _verb("jouer", "play")
PARLER = _verb("parler", "speak", "spoke")
HABITER = _verb("habiter", "live")

INTRANSITIVE = (
    _verb("dormir", "sleep", "slept", present="dors dors dort dormons dormez dorment", animate=True),
    _verb("courir", "run", "ran", present="cours cours court courons courez courent", future="courr", done="couru",
          animate=True),
    _verb("marcher", "walk", animate=True),
    _verb("nager", "swim", "swam", animate=True),
    _verb("tomber", "fall", "fell", with_etre=True, animate=True),
    _verb("arriver", "arrive", with_etre=True, animate=True),
    _verb("partir", "leave", "left", present="pars pars part partons partez partent", with_etre=True, animate=True),
    _verb("rester", "stay", with_etre=True, animate=True),
    _verb("chanter", "sing", "sang"),
    _verb("danser", "dance"),
    _verb("travailler", "work"),
    _verb("pleurer", "cry"),
    _verb("voyager", "travel", "travelled"),
    _verb("rêver", "dream"),
    _verb("répondre", "answer"),
    JOUER,
    PARLER,
)  # fmt: skip

READ = ("text",)
PEOPLE = (*HUMAN, "name")
TRANSITIVE = (
    _verb("manger", "eat", "ate", ("food", "staple"), animate=True),
    _verb("boire", "drink", "drank", ("drink",), present="bois bois boit buvons buvez boivent", done="bu",
          animate=True),
    _verb("préparer", "prepare", "", ("food",)),
    _verb("couper", "cut", "cut", ("food",)),
    _verb("acheter", "buy", "bought", ("food", "staple", "drink", "animal", *GOODS), strong="achèt"),
    _verb("vendre", "sell", "sold", ("food", "staple", "drink", "animal", *GOODS)),
    _verb("chercher", "look for", "", ("animal", "opening", "place", *GOODS, *PEOPLE), animate=True),
    _verb("trouver", "find", "found", ("animal", "opening", "place", *GOODS), animate=True),
    _verb("perdre", "lose", "lost", ("object", "clothes", "text")),
    _verb("prendre", "take", "took", ("object", "clothes", "text", "dish", "vehicle"), done="pris",
          present="prends prends prend prenons prenez prennent"),
    _verb("laver", "wash", "", ("clothes", "dish", "vehicle")),
    _verb("réparer", "repair", "", ("device", "vehicle", "opening")),
    _verb("casser", "break", "broke", ("device", "dish", "opening")),
    _verb("cacher", "hide", "hid", ("object", "clothes", "text")),
    _verb("oublier", "forget", "forgot", ("object", "clothes", "text")),
    _verb("ouvrir", "open", "", ("opening",), present="ouvre ouvres ouvre ouvrons ouvrez ouvrent", done="ouvert"),
    _verb("fermer", "close", "", ("opening",)),
    _verb("lire", "read", "read", READ, present="lis lis lit lisons lisez lisent", done="lu"),
    _verb("écrire", "write", "wrote", READ, present="écris écris écrit écrivons écrivez écrivent", done="écrit"),
    _verb("porter", "wear", "wore", ("clothes",)),
    _verb("visiter", "visit", "", ("place",)),
    _verb("voir", "see", "saw", ("animal", "food", "opening", "place", "landmark", *GOODS, *PEOPLE), done="vu",
          present="vois vois voit voyons voyez voient", future="verr", animate=True),
    _verb("regarder", "look at", "", ("animal", "place", "landmark", "object", "clothes", "vehicle", *PEOPLE),
          animate=True),
    _verb("aimer", "like", "", ("animal", "place", *GOODS, *PEOPLE), pointed=True),
    _verb("détester", "hate", "", ("animal", "place", *GOODS, *PEOPLE), pointed=True),
    _verb("aider", "help", "", PEOPLE),
    _verb("attendre", "wait for", "", PEOPLE),
    _verb("écouter", "listen to", "", PEOPLE),
    _verb("inviter", "invite", "", PEOPLE),
    _verb("remercier", "thank", "", PEOPLE),
    _verb("rencontrer", "meet", "met", PEOPLE),
    _verb("comprendre", "understand", "understood", PEOPLE, done="compris", pointed=True,
          present="comprends comprends comprend comprenons comprenez comprennent"),
    _verb("connaître", "know", "knew", PEOPLE, done="connu", completed=False, pointed=True,
          present="connais connais connaît connaissons connaissez connaissent"),
)  # fmt: skip
AVOIR_LIKE = (AVOIR, VOULOIR)

GIFTS = ("food", "object", "clothes", "text", "dish")
GIVING = (
    _verb("donner", "give", "gave", GIFTS),
    _verb("montrer", "show", "", GIFTS),
    _verb("prêter", "lend", "lent", ("object", "clothes", "text")),
    _verb("envoyer", "send", "sent", ("object", "text"), strong="envoi", future="enverr"),
    _verb("apporter", "bring", "brought", GIFTS),
)
VERBS = (
    ETRE, AVOIR, ALLER, VENIR, VOULOIR, POUVOIR, DEVOIR, HABITER, *INTRANSITIVE, *TRANSITIVE, *GIVING
)  # fmt: skip
