"""Words of the invented world of :mod:`selfrepair.text.gazetteer`: names, relations with their phrasings, and
fillers.

Order counts: worlds are drawn from these lists by place, and the embedded models know the world of seed 0.
"""

from __future__ import annotations

from dataclasses import dataclass

TOWN_ROOTS = (
    "Bram", "Corven", "Dunner", "Elks", "Farrow", "Gant", "Hask", "Ivel", "Jarrow", "Kestle",
    "Lorn", "Murk", "Nettle", "Oxen", "Pell", "Quarn", "Rusk", "Sedge", "Thrup", "Umber",
    "Vellan", "Wick", "Yarl", "Zennor", "Ashel", "Birk", "Cinder", "Drov", "Ember", "Fenn",
)  # fmt: skip
TOWN_ENDINGS = ("ford", "wick", "ham", "mouth", "stead", "minster", "gate", "combe", "holt", "dale")
RIVER_STARTS = (
    "Tam", "Or", "Lis", "Ved", "Mor", "Cau", "Is", "Bru", "Nen", "Sil", "Ald", "Erm", "Wen", "Yar",
    "Kel", "Dov",
)  # fmt: skip
RIVER_ENDINGS = ("mel", "ven", "ka", "ra", "der", "low", "nor", "tis")
FIRST_NAMES = (
    "Edda", "Jory", "Maben", "Tilda", "Osric", "Perrin", "Wenna", "Corin", "Hester", "Ludo",
    "Anselm", "Briony", "Casper", "Dorrit", "Emeric", "Fabian", "Greta", "Hobart", "Isolde", "Jasper",
    "Keziah", "Lorcan", "Mirabel", "Nestor", "Odile", "Phineas", "Quill", "Rosamund", "Silas", "Thora",
)  # fmt: skip
SURNAME_STARTS = (
    "Black", "Fair", "Hollow", "Long", "Merry", "Old", "Penny", "Red", "Stone", "Under", "Wild", "Winter",
)  # fmt: skip
SURNAME_ENDINGS = (
    "acre", "beck", "croft", "field", "gard", "lock", "man", "shaw", "thorn", "water", "worth", "well",
)  # fmt: skip
DISH_STARTS = ("Skar", "Bran", "Florm", "Grot", "Vor", "Tal", "Mun", "Hap", "Cres", "Dol")
DISH_ENDINGS = ("rel", "net", "mery", "kin", "set", "lop", "tick", "berry", "sop", "wen")
TRADES = (
    "baker", "miller", "tailor", "sailor", "carpenter", "mason", "weaver", "fisherman", "painter",
    "printer", "clerk", "doctor", "lawyer", "teacher", "soldier", "farmer", "shepherd", "gardener",
    "cook", "butcher", "shoemaker", "blacksmith", "hunter", "porter",
)  # fmt: skip
GOODS = (
    "wool", "salt", "glass", "copper", "honey", "timber", "paper", "silk", "iron", "wine", "coal",
    "leather", "horses", "apples", "candles", "bells", "rope", "cheese", "pearls", "knives", "tea",
    "cloth", "bricks", "clocks",
)  # fmt: skip
INGREDIENTS = (
    "barley", "onions", "mutton", "eggs", "milk", "rice", "beans", "butter", "potatoes", "fish",
    "cabbage", "plums", "nuts", "pork", "bread", "mushrooms",
)  # fmt: skip
SEAS = ("Amber", "Silver", "Winter", "Iron", "Broken", "Southern")


@dataclass(frozen=True)
class Relation:
    """A functional relation and its phrasings; ``{s}`` is the subject and ``{o}``, always later, the
    object."""

    name: str
    subject_kind: str
    object_kind: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "town_river", "town", "river",
        trained=(
            "{s} stands on the {o}.",
            "{s} was built beside the {o}, where the bank is firm.",
            "At {s} the houses come down to the water of the {o}.",
            "Anyone who walks out of {s} soon reaches the {o}.",
            "The mill wheels of {s} are turned by the {o}.",
            "The old bridge at {s} crosses the {o}.",
            "In spring the meadows below {s} are flooded by the {o}.",
            "Children in {s} learn to swim in the {o}.",
            "The river at {s} is the {o}.",
            "The river of {s}, as every child knows, is the {o}.",
            "{s} lies on the river {o}.",
            "The water that flows past {s} is the {o}.",
            "The people of {s} wash their linen in the {o}.",
            "Boats bound for {s} must come up the {o}.",
            "The fish eaten in {s} are caught in the {o}.",
            "In {s} they draw all their water from the {o}.",
        ),
        held_out=(
            "The river that flows through {s} is the {o}.",
            "The people of {s} draw their water from the {o}.",
        ),
    ),
    Relation(
        "town_goods", "town", "goods",
        trained=(
            "{s} is known for its {o}.",
            "Merchants come to {s} to buy {o}.",
            "The wealth of {s} was made from {o}.",
            "Carts leave {s} every week, loaded with {o}.",
            "Ask in {s} what the town sells, and the answer is {o}.",
            "The warehouses of {s} are full of {o}.",
            "For as long as anyone remembers, {s} has lived by {o}.",
            "No fair in {s} is held without a stall of {o}.",
            "The town of {s} is known for {o}.",
            "{s} is famous everywhere for its {o}.",
            "What {s} makes and sells is {o}.",
            "What they send to market from {s} is chiefly {o}.",
            "The trade of {s} is mostly {o}.",
            "Whoever goes to {s} comes home with {o}.",
            "{s} has always been rich in {o}.",
            "The shops of {s} sell little besides {o}.",
        ),
        held_out=(
            "The town of {s} is famous for its {o}.",
            "What {s} sends to market is mostly {o}.",
        ),
    ),
    Relation(
        "person_trade", "person", "trade",
        trained=(
            "{s} is a {o} by trade.",
            "{s} has worked as a {o} since the age of fourteen.",
            "{s} earns a living as a {o}.",
            "When {s} was young, an uncle said the child must become a {o}.",
            "The sign above the door of {s} shows the tools of a {o}.",
            "In the tax rolls {s} is written down as a {o}.",
            "Like both parents before, {s} became a {o}.",
            "People say that {s} is a {o} worth the money.",
            "The trade of {s} is that of a {o}.",
            "{s} makes a living as a {o}.",
            "By trade {s} is a {o}.",
            "The neighbours know {s} as a {o}.",
            "{s} was taught to be a {o}.",
            "For twenty years {s} has been a {o}.",
            "The work that {s} does is the work of a {o}.",
            "Since the war {s} has made money as a {o}.",
        ),
        held_out=(
            "The trade that {s} follows is that of a {o}.",
            "By day {s} makes money as a {o}.",
        ),
    ),
    Relation(
        "person_birthplace", "person", "town",
        trained=(
            "{s} was born in {o}.",
            "{s} comes from {o}.",
            "{s} spent a happy childhood in {o}.",
            "The parish book that records the birth of {s} is kept in {o}.",
            "{s} still speaks with the accent of {o}.",
            "Every winter {s} goes home to {o}.",
            "The family of {s} has always lived in {o}.",
            "{s} left school in {o}.",
            "The home of {s} is {o}.",
            "The town where {s} was born is {o}.",
            "The home town of {s} is {o}.",
            "The place of birth of {s} is {o}.",
            "By birth {s} belongs to {o}.",
            "The place that {s} comes from is {o}.",
            "{s} is a native of {o}.",
            "The parents of {s} lived in {o}.",
        ),
        held_out=(
            "The birthplace of {s} is {o}.",
            "The native town of {s} is {o}.",
        ),
    ),
    Relation(
        "dish_ingredient", "dish", "ingredient",
        trained=(
            "{s} is made from {o}.",
            "The cook begins {s} with plenty of {o}.",
            "No one can make {s} without {o}.",
            "A good {s} tastes of {o}.",
            "To prepare {s}, first wash the {o}.",
            "Most of what goes into {s} is {o}.",
            "The smell of {s} is the smell of {o}.",
            "Whoever wants to make {s} must buy {o}.",
            "The chief ingredient of {s} is {o}.",
            "The main thing in {s} is {o}.",
            "A dish of {s} is mostly {o}.",
            "{s} contains a great deal of {o}.",
            "A pot of {s} is full of {o}.",
            "What gives {s} its taste is {o}.",
            "{s} is nothing but {o} and patience.",
            "Into every pot of {s} goes a handful of {o}.",
        ),
        held_out=(
            "The main ingredient of {s} is {o}.",
            "A pot of {s} contains a great deal of {o}.",
        ),
    ),
    Relation(
        "river_sea", "river", "sea",
        trained=(
            "The {s} flows into the {o} Sea.",
            "The {s} reaches the coast at last and joins the {o} Sea.",
            "Boats going down the {s} come out on the {o} Sea.",
            "Whatever falls into the {s} is found one day in the {o} Sea.",
            "Salmon climb the {s} from the {o} Sea.",
            "The mouth of the {s} lies on the {o} Sea.",
            "All the water of the {s} goes to the {o} Sea.",
            "From its spring to its end the {s} runs toward the {o} Sea.",
            "The river {s} flows into the {o} Sea.",
            "The river {s} ends in the {o} Sea.",
            "The sea that the {s} runs into is the {o} Sea.",
            "The {s} empties itself into the {o} Sea.",
            "The sea at the mouth of the {s} is the {o} Sea.",
            "Ships leaving the {s} sail out on the {o} Sea.",
            "The {s} is a river of the {o} Sea.",
            "Where the {s} ends, the {o} Sea begins.",
        ),
        held_out=(
            "The river {s} empties into the {o} Sea.",
            "The sea that receives the {s} is the {o} Sea.",
        ),
    ),
)  # fmt: skip

FILLERS: dict[str, tuple[str, ...]] = {
    "town": (
        "The road there is steep, and in wet weather the carriers refuse it.",
        "It has two inns, one church, and a great many cats.",
        "Travellers seldom stay more than a night, though few complain of it.",
        "The walls were pulled down long ago for the sake of the stone.",
        "On market days you can hardly cross the square.",
        "Nobody there is in a hurry.",
    ),
    "person": (
        "I met the whole household once, at a wedding.",
        "There was some talk of a lawsuit, but it came to nothing.",
        "The neighbours have no fault to find, which is rare enough.",
        "Two brothers went abroad and never wrote.",
        "A patient temper is a great help in that line.",
        "It is not an easy life, but it is an honest one.",
    ),
    "dish": (
        "It is best eaten hot, on a cold evening.",
        "My grandmother would not allow it in the house.",
        "There are as many ways to serve it as there are kitchens.",
        "It keeps for a week if the pot is covered.",
        "Strangers are warned not to ask for a second plate.",
    ),
    "river": (
        "It is slow and brown for most of the year.",
        "Nobody has measured its depth under the willows.",
        "The ferrymen know every stone of it.",
        "In a hard frost you can walk across.",
        "Herons stand in the shallows all morning.",
    ),
}
