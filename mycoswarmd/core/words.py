"""Six words for an id, so that two people (or one, at two machines) can compare it without spelling.

Law: a person's convenience, never a proof. 48 bits are enough against somebody who must answer while the
person looks; what identifies a key is the whole id.
"""

import hashlib

WORDS = tuple(
    """
    acid acorn actor agent alarm album amber anchor angle ankle apple apron arch arena armor arrow atlas
    attic autumn bacon badge bagel baker bamboo banjo barrel basin basket beach beaver bench berry bison
    blade blanket bottle bounce brick bridge bronze brush bucket bugle butter cabin cable cactus camel
    candle canoe canyon carpet castle cedar cello chalk cherry chess cider cinema circus citrus clay cliff
    clock cloud clover cobalt coconut coffee comet copper coral cotton couch crane crater crayon cricket
    crown crystal cup cycle dairy daisy dance dawn deer delta denim desert diamond dinner disk dolphin
    donkey door dragon drum duck dune eagle easel echo eclipse elbow elephant ember engine envelope fabric
    falcon farm feather fence ferry fiddle fig flame flute fog forest fossil fox frost galaxy garden
    garlic gazelle giant ginger glacier glove goat granite grape guitar gull hammer harbor hazel helmet
    heron hill honey hornet hotel husky ice igloo indigo ink iris island ivory jacket jaguar jelly jewel
    juice jungle kayak kettle kite kiwi koala ladder lagoon lamp lantern laurel leaf lemon lever lily
    lizard lobster locket lotus lunar magnet mango maple marble meadow melon meteor mint mirror moon moss
    mountain mule museum nail navy needle nest nickel noodle oak oasis ocean olive onion opal orbit orchid
    otter owl oxygen oyster paddle palm panda paper parrot peach pearl pepper piano pigeon pillow pine
    planet plum pocket pond poppy potato pumpkin puzzle quartz quilt rabbit radar raven ribbon river robin
    rocket saddle salmon satin silver spider spoon sugar sunset teapot tiger tulip turtle velvet violin
    walnut
    """.split()  # noqa: SIM905 - a list of 256 strings is no page to read
)


def six_words(node_id: str) -> str:
    """Return the words of an id: the first six bytes of its SHA-256, each a word."""
    digest = hashlib.sha256(node_id.encode("ascii")).digest()
    return " ".join(WORDS[byte] for byte in digest[:6])
