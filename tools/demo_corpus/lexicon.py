"""The words: nouns, names, adjectives, determiners, pronouns, numbers and adverbs, as tables.

A row is `French gender English`; a slash gives an irregular plural (`cheval/chevaux`). Each word has one English
equivalent wherever the grammar uses it, so a French sentence has one translation.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.demo_corpus.morphology import english_plural, french_plural


@dataclass(frozen=True)
class Noun:
    """A noun of one gender. The two genders of a profession share `lemma`; `kind` rules what it combines with."""

    singular: str
    plural: str
    feminine: bool
    english: str
    english_plural: str
    kind: str
    lemma: str


@dataclass(frozen=True)
class Adjective:
    """An adjective with its two singulars and, for beau, nouveau and vieux, the form before a vowel."""

    masculine: str
    feminine: str
    english: str
    kinds: frozenset[str]
    before_noun: bool
    gradable: bool
    before_vowel: str

    def agreed(self, feminine: bool, plural: bool) -> str:
        """Returns the form for a gender and a number: petit, petite, petits, petites."""
        form = self.feminine if feminine else self.masculine
        return french_plural(form) if plural else form


def _rows(table: str) -> list[list[str]]:
    return [row.split() for row in table.replace("\n", ",").split(",") if row.strip()]


def _nouns(kind: str, table: str) -> tuple[Noun, ...]:
    nouns = []
    for french, gender, english in _rows(table):
        singular, _, plural = french.partition("/")
        one, _, many = english.partition("/")
        plural, many = plural or french_plural(singular), many or english_plural(one)
        nouns.append(Noun(singular, plural, gender == "f", one, many, kind, singular))
    return tuple(nouns)


def _professions(table: str) -> tuple[Noun, ...]:
    nouns = []
    for masculine, feminine, english in _rows(table):
        for form, is_feminine in ((masculine, False), (feminine, True)):
            plural, many = french_plural(form), english_plural(english)
            nouns.append(Noun(form, plural, is_feminine, english, many, "profession", masculine))
    return tuple(nouns)


def _adjectives(kinds: str, table: str, *, before_noun: bool = False, gradable: bool = True) -> tuple[Adjective, ...]:
    adjectives = []
    for masculine, feminine, english in _rows(table):
        masculine, _, before_vowel = masculine.partition("/")
        where = frozenset(kinds.split())
        adjectives.append(
            Adjective(masculine, feminine, english, where, before_noun, gradable, before_vowel or masculine)
        )
    return tuple(adjectives)


HUMAN = ("person", "relative", "parent", "profession")
GOODS = ("object", "device", "dish", "clothes", "text", "vehicle")
MASS = ("staple", "drink")

NOUNS: tuple[Noun, ...] = (
    *_nouns(
        "person",
        """
        homme m man/men, femme f woman/women, garçon m boy, fille f girl, enfant m child/children
        roi m king, reine f queen
        """,
    ),
    *_nouns("parent", "père m father, mère f mother"),
    *_nouns(
        "relative",
        """
        frère m brother, sœur f sister, oncle m uncle, tante f aunt, cousin m cousin, cousine f cousin
        ami m friend, amie f friend, voisin m neighbour, voisine f neighbour
        """,
    ),
    *_professions(
        """
        étudiant étudiante student, avocat avocate lawyer, médecin médecin doctor, infirmier infirmière nurse
        boulanger boulangère baker, professeur professeure teacher, chanteur chanteuse singer
        danseur danseuse dancer, journaliste journaliste journalist, dentiste dentiste dentist
        musicien musicienne musician, écrivain écrivaine writer, ingénieur ingénieure engineer
        agriculteur agricultrice farmer, coiffeur coiffeuse hairdresser, architecte architecte architect
        artiste artiste artist, peintre peintre painter, juge juge judge, pharmacien pharmacienne pharmacist
        """
    ),
    *_nouns(
        "animal",
        """
        chat m cat, chien m dog, cheval/chevaux m horse, oiseau m bird, vache f cow, souris f mouse/mice
        lapin m rabbit, mouton m sheep/sheep, cochon m pig, loup m wolf/wolves, canard m duck, poule f hen
        âne m donkey, singe m monkey, hibou/hiboux m owl, hamster m hamster
        """,
    ),
    *_nouns(
        "food",
        """
        pomme f apple, orange f orange, œuf m egg, gâteau m cake, poire f pear, banane f banana
        fraise f strawberry, citron m lemon, tomate f tomato/tomatoes, carotte f carrot, haricot m bean, salade f salad
        """,
    ),
    *_nouns(
        "staple", "pain m bread, fromage m cheese, riz m rice, viande f meat, beurre m butter, chocolat m chocolate"
    ),
    *_nouns("drink", "eau f water, lait m milk, café m coffee, thé m tea, vin m wine, bière f beer"),
    *_nouns(
        "object",
        """
        stylo m pen, clé f key, sac m bag, fleur f flower, ballon m ball, cadeau m gift, photo f photo
        couteau m knife/knives, image f picture, parapluie m umbrella
        """,
    ),
    *_nouns(
        "device",
        "table f table, chaise f chair, lampe f lamp, téléphone m phone, ordinateur m computer, horloge f clock",
    ),
    *_nouns("dish", "verre m glass, assiette f plate, tasse f cup, bouteille f bottle"),
    *_nouns(
        "clothes",
        "chapeau m hat, robe f dress, chemise f shirt, manteau m coat, jupe f skirt, écharpe f scarf/scarves",
    ),
    *_nouns("text", "livre m book, lettre f letter, histoire f story, poème m poem, message m message, roman m novel"),
    *_nouns("vehicle", "voiture f car, vélo m bike, bateau m boat, train m train, avion m plane, camion m truck"),
    *_nouns("opening", "porte f door, fenêtre f window, boîte f box, valise f suitcase"),
    *_nouns(
        "place",
        """
        maison f house, école f school, musée m museum, jardin m garden, parc m park, gare f station
        hôpital/hôpitaux m hospital, hôtel m hotel, restaurant m restaurant, bureau m office, banque f bank
        église f church, ville f city, village m village, forêt f forest, château m castle, magasin m shop
        bibliothèque f library, usine f factory, théâtre m theatre, appartement m flat, cuisine f kitchen
        """,
    ),
    *_nouns(
        "landmark", "plage f beach, pont m bridge, rivière f river, montagne f mountain, île f island, marché m market"
    ),
)

NAMES = (
    ("Marie", True), ("Paul", False), ("Sophie", True), ("Pierre", False), ("Alice", True), ("Lucas", False),
    ("Anne", True), ("Louis", False), ("Julie", True), ("Antoine", False),
)  # fmt: skip

ADJECTIVES: tuple[Adjective, ...] = (
    *_adjectives(
        "animal object device dish clothes vehicle opening",
        "noir noire black, blanc blanche white, gris grise grey",
        gradable=False,
    ),
    *_adjectives(
        "object device dish clothes vehicle opening",
        "rouge rouge red, vert verte green, bleu bleue blue",
        gradable=False,
    ),
    *_adjectives(
        "person relative parent profession",
        """
        intelligent intelligente intelligent, gentil gentille kind, riche riche rich, sérieux sérieuse serious
        timide timide shy, courageux courageuse brave, poli polie polite, drôle drôle funny, paresseux paresseuse lazy
        """,
    ),
    *_adjectives(
        "person relative parent profession animal",
        """
        fatigué fatiguée tired, heureux heureuse happy, triste triste sad, malade malade sick, calme calme calm
        fort forte strong
        """,
    ),
    *_adjectives(
        "person relative parent profession",
        """
        français française French, anglais anglaise English, italien italienne Italian, allemand allemande German
        espagnol espagnole Spanish
        """,
        gradable=False,
    ),
    *_adjectives("person relative profession animal", "jeune jeune young", before_noun=True),
    *_adjectives(
        "person relative profession animal object device dish clothes text vehicle opening place",
        "vieux/vieil vieille old",
        before_noun=True,
    ),
    *_adjectives(
        "person animal food object device dish vehicle opening place landmark", "petit petite small", before_noun=True
    ),
    *_adjectives("animal food object device dish vehicle opening place landmark", "grand grande big", before_noun=True),
    *_adjectives("animal", "gros grosse fat", before_noun=True),
    *_adjectives(
        "animal object device dish clothes text vehicle place landmark", "beau/bel belle beautiful", before_noun=True
    ),
    *_adjectives("object dish clothes place landmark", "joli jolie pretty", before_noun=True),
    *_adjectives("device dish clothes text vehicle place", "nouveau/nouvel nouvelle new", before_noun=True),
    *_adjectives("food staple drink text", "bon bonne good, mauvais mauvaise bad", before_noun=True),
    *_adjectives("food staple drink", "chaud chaude hot, froid froide cold, frais fraîche fresh"),
    *_adjectives("staple", "salé salée salty"),
    *_adjectives("object device dish clothes vehicle opening animal", "propre propre clean, sale sale dirty"),
    *_adjectives("object device dish clothes vehicle food", "cher chère expensive"),
    *_adjectives("object device vehicle opening", "lourd lourde heavy"),
    *_adjectives("device dish opening vehicle", "cassé cassée broken", gradable=False),
    *_adjectives(
        "text", "amusant amusante amusing, intéressant intéressante interesting, important importante important"
    ),
    *_adjectives("object device vehicle text", "utile utile useful"),
    *_adjectives("vehicle animal", "rapide rapide fast"),
    *_adjectives("place text", "étrange étrange strange, célèbre célèbre famous"),
    *_adjectives("place", "moderne moderne modern, tranquille tranquille quiet"),
    *_adjectives("opening", "ouvert ouverte open, fermé fermée closed", gradable=False),
)

# Set phrases with a meaning of their own: "une vieille fille" is a spinster.
UNSAID = frozenset((("vieux", "fille"), ("vieux", "garçon"), ("vieux", "enfant")))
# States that pass, so that one can be tired today.
PASSING = frozenset(("fatigué", "heureux", "triste", "malade", "calme"))

# masculine, feminine, plural; English singular, English plural
DEFINITE = ("le", "la", "les", "the", "the")
INDEFINITE = ("un", "une", "des", "a", "some")
DEMONSTRATIVE = ("ce", "cette", "ces", "this", "these")
POSSESSIVES = (
    ("mon", "ma", "mes", "my", "my"), ("ton", "ta", "tes", "your", "your"), ("notre", "notre", "nos", "our", "our"),
    ("votre", "votre", "vos", "your", "your"), ("leur", "leur", "leurs", "their", "their"),
)  # fmt: skip

# French, English, person 0-5, gender (None: either), number (None: either)
PRONOUNS: tuple[tuple[str, str, int, bool | None, bool | None], ...] = (
    ("je", "I", 0, None, False), ("tu", "you", 1, None, False), ("il", "he", 2, False, False),
    ("elle", "she", 2, True, False), ("nous", "we", 3, None, True), ("vous", "you", 4, None, None),
    ("ils", "they", 5, False, True), ("elles", "they", 5, True, True),
)  # fmt: skip
# French, English, the person a subject must not share with it
OBJECT_PRONOUNS = (
    ("me", "me", 0), ("te", "you", 1), ("le", "him", -1), ("la", "her", -1),
    ("nous", "us", 3), ("vous", "you", 4), ("les", "them", -1),
)  # fmt: skip
STRESSED_PRONOUNS = (
    ("moi", "me", 0), ("toi", "you", 1), ("lui", "him", 2), ("elle", "her", 2),
    ("nous", "us", 3), ("vous", "you", 4), ("eux", "them", 5), ("elles", "them", 5),
)  # fmt: skip

NUMBERS = (
    ("deux", "two"), ("trois", "three"), ("quatre", "four"), ("cinq", "five"), ("six", "six"), ("sept", "seven"),
    ("huit", "eight"), ("neuf", "nine"), ("dix", "ten"), ("onze", "eleven"), ("douze", "twelve"), ("quinze", "fifteen"),
    ("vingt", "twenty"), ("trente", "thirty"), ("quarante", "forty"), ("cent", "a hundred"),
)  # fmt: skip

TIMES = {
    "present": (
        ("le matin", "in the morning"), ("le soir", "in the evening"),
        ("chaque jour", "every day"), ("le lundi", "on Mondays"),
    ),
    "state": (("aujourd'hui", "today"), ("maintenant", "now")),
    "past": (
        ("hier", "yesterday"), ("ce matin", "this morning"), ("la semaine dernière", "last week"),
        ("lundi", "on Monday"),
    ),
    "future": (
        ("demain", "tomorrow"), ("ce soir", "this evening"), ("la semaine prochaine", "next week"),
        ("mardi", "on Tuesday"),
    ),
}  # fmt: skip
TIMES["imperfect"] = TIMES["past"]

DEGREES = (("très", "very"), ("trop", "too"))
AROUND = (("devant", "in front of"), ("derrière", "behind"), ("près de", "near"), ("à côté de", "next to"))
ON_SURFACES = (("sur", "on"), ("sous", "under"))
STATES = (
    ("faim", "hungry"), ("soif", "thirsty"), ("froid", "cold"), ("chaud", "hot"),
    ("peur", "afraid"), ("sommeil", "sleepy"), ("raison", "right"), ("tort", "wrong"),
)  # fmt: skip
GAMES = (("le football", "football"), ("le tennis", "tennis"), ("le rugby", "rugby"), ("les cartes", "cards"))
INSTRUMENTS = (
    ("le piano", "the piano"), ("la guitare", "the guitar"), ("le violon", "the violin"), ("la flûte", "the flute"),
)  # fmt: skip
LANGUAGES = (
    ("français", "French"), ("anglais", "English"), ("italien", "Italian"), ("allemand", "German"),
    ("espagnol", "Spanish"), ("russe", "Russian"),
)  # fmt: skip
HOMES = (
    ("à Paris", "in Paris"), ("à Lyon", "in Lyon"), ("à Londres", "in London"), ("en France", "in France"),
    ("en Italie", "in Italy"), ("en Espagne", "in Spain"), ("au Japon", "in Japan"), ("au Canada", "in Canada"),
)  # fmt: skip
