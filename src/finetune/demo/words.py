"""Word pools of the generated text, and made-up words.

Pre-training and the demo share the real words: what tuning must teach is the tools, not the words. Made-up words
occur in pre-training only, where nothing but copying can repeat them.
"""

import random
from functools import cache

NAMES = """
Ada Agnes Aisha Alba Alfred Alice Amara Amir Ana Anders Anita Anton Arthur Asha Astrid Aurora Beatrix Ben Bianca
Boris Brigit Bruno Camille Carla Carlos Cecil Celia Chen Chloe Clara Colin Cora Cyrus Dalia Damian Daphne Dara
David Delia Derek Dina Dmitri Dora Edgar Edith Elena Elias Ellen Elsa Emil Emma Erik Esther Eva Ezra Fatima Felix
Fiona Flora Frank Freya Gail George Gina Gloria Greta Gustav Hana Harold Hassan Hazel Hector Helga Henry Hilda
Hugo Ibrahim Ida Igor Imani Ines Ingrid Irene Iris Isaac Ivan Jack Jana Jasper Joan Jonas Josef Joyce Julia June
Kamal Karen Karim Kate Keiko Kenji Kira Klaus Lars Laura Leila Leo Lena Liam Lila Linda Lorenzo Louis Lucia Luke
Magda Maja Malik Marco Margo Maria Marta Matteo Max Maya Mei Mila Milo Miriam Mona Morris Nadia Naomi Nell Nico
Nina Noah Nora Olaf Olga Oliver Omar Oscar Otto Paolo Paula Pedro Penny Peter Petra Philip Piotr Priya Quentin
Rafael Ralph Rani Raul Ravi Rita Robert Rosa Rowan Ruby Rufus Ruth Sadie Salma Samir Sandra Selma Simon Sofia
Sonia Stefan Stella Sven Talia Tamar Tara Tariq Thea Theo Tobias Tomas Ulla Umar Una Uri Vera Victor Viola Vito
Wanda Willem Wilma Xavier Yara Yasmin Yosef Yuki Yusuf Zara Zeno Zoe
"""

PLACES = """
Aberdeen Accra Adelaide Algiers Almeria Antwerp Athens Avignon Baku Bari Basel Beirut Belfast Bergen Berlin Bern
Bilbao Bogota Bologna Bordeaux Boston Bremen Brest Bristol Brno Bruges Cadiz Cairo Calgary Cardiff Chicago Cologne
Cordoba Cork Cusco Dakar Dallas Davos Delft Denver Detroit Dover Dresden Dublin Dundee Durban Essen Exeter Faro Fes
Florence Geneva Genoa Ghent Glasgow Granada Graz Haifa Halifax Hamburg Hanoi Havana Helsinki Houston Innsbruck
Istanbul Jakarta Kampala Kassel Kelso Kobe Krakow Kyoto Lagos Leeds Leiden Leipzig Lima Linz Lisbon London Lucca Lund
Lyon Madrid Malaga Malmo Manila Marseille Melbourne Memphis Milan Modena Mombasa Monaco Munich Murcia Nairobi Namur
Nantes Naples Narvik Nice Odense Oporto Orlando Osaka Oslo Ottawa Oxford Palermo Paris Parma Perth Pisa Porto Prague
Quito Rabat Reims Riga Rome Rouen Salerno Salzburg Seattle Seoul Seville Siena Sofia Split Sydney Tampa Tangier
Tbilisi Tokyo Toledo Toronto Trieste Tromso Tunis Turin Utrecht Valencia Venice Verona Vienna Vilnius Warsaw York
Zagreb Zurich
"""

NOUNS = """
acorn actor airport album almanac anchor anthem apron archive arena armour arrow atlas attic autumn avenue badge bakery
balcony ballad bamboo banjo banner barrel basement basket beacon bedroom beetle bench bicycle blanket blossom boiler
bonfire bottle boulder bracelet bridge bronze bucket budget bulletin butler button cabin cable cactus camera campus
canal candle canoe canvas canyon carpet carriage castle cathedral ceiling cellar cello census ceramic chapel chapter
charter chimney choir cinema circus clinic cloak cobbler comet compass contract copper coral cottage courier cradle
crane crayon creek cricket crystal curtain cushion dancer decade desert diagram diary dolphin donkey dragon drawer
drill drummer easel eclipse editor elbow emblem engine essay estate exhibit fabric factory falcon farmer feather
fence ferry festival fiddle filter finance fireplace flannel flute folder forest forge fossil fountain freight
furnace gadget galaxy gallery garage garden gazette glacier glove goblet granite gravel guitar gutter hallway hammer
hammock harbour harness harvest hedge helmet hermit hinge horizon hostel hotel husky iceberg index insect insurance
invoice island jacket jersey jewel jigsaw journal jungle kayak kennel kettle keyboard kitchen kitten ladder lagoon
lantern laundry lawyer leaflet lecture ledger lesson letter library lighthouse lizard lobby locker lottery lumber
magnet mailbox mansion maple marble market marsh mattress meadow medal melody memo merchant meteor mill mirror mitten
monument morning mosaic motor mountain museum napkin needle notebook novel nursery oasis ocean office orbit orchard
orchestra organ oven owl oyster package paddle painter palace panel parade parcel parlour passport pasture patio
pavement pebble pencil pension permit petition piano picnic pigeon pillow pilot planet plaster plaza plumber pocket
podium poem policy pond portrait poster pottery prairie printer prism prize pulley puppet puzzle quarry quartz quilt
rabbit radar radiator railing rain ranch recipe recital reef refund rehearsal reservoir ribbon rifle river rocket roof
rooster roster rudder saddle sailor salary sandal satellite saucer scaffold scarf schedule school sculptor seminar
sermon shed shelf shelter sheriff shipment shovel shutter sidewalk signal silver sketch skyline sleigh sofa soldier
spider spiral stable stadium staircase statue stove studio suburb suitcase summit sundial survey swamp syllabus
symphony tablet tailor tavern teapot telescope temple tenant tennis terrace theatre thesis thunder ticket timber tower
tractor trailer treaty trellis trophy trumpet tunnel turbine turtle tutor umbrella uniform vacuum valley vault velvet
veranda vessel village vineyard violin visa volcano voyage waggon walnut warehouse waterfall wharf wheel whistle
widget window winter wizard workshop yacht yard zebra zipper
"""

ADJECTIVES = """
aerial amber ancient annual arctic autumnal azure bright brisk broken busy calm central cheap chilly civic classic
clean clever coastal cold compact crimson crisp cubic curious daily damp dark dense digital distant double dusty
early eastern elegant empty endless faded famous fancy fast fierce final flat foggy foreign formal fragile frosty
frozen gentle giant global golden grand green grey hollow honest humble hungry icy idle indoor inner jolly joint
junior kind large late lazy legal little local lonely long loud lucky lunar major mellow merry mild minor misty
mobile modern modest muddy narrow native neat new noble noisy northern novel odd old olive open orange outdoor pale
plain polar polite private proud public purple quick quiet quaint rapid rare ready regal remote rich rigid robust
rough round royal rural rusty sacred salty scarlet secret senior sharp shiny short silent simple sleepy slim smooth
snowy soft solar solid southern spare special spicy square steady steep stormy strong sturdy sunny sweet swift tall
tame tidy tiny tough tropical urban urgent vacant vast violet vital vivid warm weekly western wild windy wise wooden
yearly young
"""

VERBS = """
adjust assemble borrow brush burn carry catch change charge check clean clear close collect copy count cover cut deliver
describe draw dry empty feed fetch fill find fix fold gather greet grease guard hang hide hire inspect iron label lift
load lock measure mend move oil open order pack paint patch photograph pick plant polish post press print pull raise
rake rent repair replace rescue rinse scan scrub sell sharpen show sketch sort stack store sweep test tidy trim tune
unload visit wash water wax weigh wipe wrap
"""

ITEMS = """
almonds apples apricots bacon bagels bananas barley basil beans beetroot biscuits blueberries bread broccoli butter
cabbage candles capers carrots cashews celery cheese cherries chillies chocolate cider cinnamon cloves cocoa coconuts
coffee cookies courgettes crackers cream cucumbers currants dates dill eggs endives fennel figs flour garlic ginger
grapes ham hazelnuts honey jam juice kale ketchup leeks lemons lentils lettuce limes mangoes margarine marmalade melons
milk mint muesli mushrooms mustard napkins noodles nutmeg oats olives onions oranges oregano pancakes papayas paprika
parsley parsnips pasta peaches peanuts pears peas pepper pickles pistachios plums pork potatoes prunes pumpkins quinoa
radishes raisins raspberries rice rosemary saffron sage salad salmon salt sardines sausages sesame shallots shrimps soap
soup spinach squash sugar syrup tea thyme tofu tomatoes towels trout tuna turnips vanilla vinegar walnuts wine yeast
yoghurt
"""

COMMON = """
about account add address again agenda alarm alert all amount answer append archive ask attach back before begin book
bring build buy calendar call cancel category change chat choose close code colour contact convert copy count create
data date day delete detail device document done draft edit email end entry event every expense field file final find
finish first folder follow for form format free from give go group guide have heading help here home hour idea image
important in info inside into invite item join jot keep kind label last later learn leave length level line link list
log look mail make map mark mention message minute minutes money month move my name new next note number of on open
option order out over page paid path pay people person phone photo place plan play point price print project put
quantity query question quick read recipient record remind reminder remove rename reply report request result review
right room route run save say schedule search see send set share shift shop show size sort start stop store subject
table tag take task tell text that this throw time timer title to today tool topic track travel turn type under unit
until update user value view want watch way week what when where which with word work write year
"""


@cache
def words_of(pool: str) -> tuple[str, ...]:
    """The words of a pool: `names`, `places`, `nouns`, ..."""
    return tuple(POOLS[pool].split())


POOLS = {
    "names": NAMES,
    "places": PLACES,
    "nouns": NOUNS,
    "adjectives": ADJECTIVES,
    "verbs": VERBS,
    "items": ITEMS,
    "common": COMMON,
}

_SOUNDS = {
    "onset": "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl l m n p pl pr qu r s sh sk sl st st t th tr v w z",
    "vowel": "a e i o u ai ea ee ia io oa oo ou",
    "coda": "b ck d g l ll m n nd nt p r rn s st t x",
}
_OPEN_SYLLABLES = 0.15


@cache
def _sounds(kind: str) -> tuple[str, ...]:
    return tuple(_SOUNDS[kind].split())


def _syllable(rng: random.Random) -> str:
    start = rng.choice(_sounds("onset")) + rng.choice(_sounds("vowel"))
    return start if rng.random() < _OPEN_SYLLABLES else start + rng.choice(_sounds("coda"))


def made_up_word(rng: random.Random) -> str:
    """A word that no pool holds, of syllables or of two halves of real words: only copying can repeat it."""
    if rng.random() < 0.5:
        return "".join(_syllable(rng) for _ in range(rng.choice((1, 2, 2))))
    head, tail = (rng.choice(words_of(rng.choice(tuple(POOLS)))).lower() for _ in range(2))
    return head[: rng.randrange(1, 5)] + tail[-rng.randrange(1, 5) :]
