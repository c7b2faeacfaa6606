"""What the lab's people talk about: everyday tasks, each with its steps, needs, tips and slips.

Texts are templates: ``{a|b}`` stands for one of its alternatives, drawn anew for every answer, and braces may nest.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One task that a user may ask about.

    Attributes:
        do: the task as an infinitive without "to".
        doing: the task as a gerund.
        steps: what to do, in order; imperatives without a capital or a full stop.
        needs: what to have at hand.
        tips: full clauses of advice.
        slips: the usual mistakes, as gerunds.
        minutes: the shortest and the longest time it takes.
    """

    do: str
    doing: str
    steps: tuple[str, ...]
    needs: tuple[str, ...]
    tips: tuple[str, ...]
    slips: tuple[str, ...]
    minutes: tuple[int, int]


TOPICS: tuple[Topic, ...] = (
    Topic(
        "clean a cast iron pan",
        "cleaning a cast iron pan",
        (
            "{let the pan cool|wait until the pan is warm, not hot}",
            "scrub it with {coarse salt|a stiff brush} and {a little|a splash of} hot water",
            "dry it {at once|completely} {with a towel|over a low flame}",
            "rub a thin {layer|film} of oil into the {surface|iron}",
        ),
        ("coarse salt", "a stiff brush", "a dry towel", "a spoon of oil"),
        (
            "{a drop of|a little} soap {does no harm|is fine} as long as you dry the pan",
            "{a hot oven|an hour in the oven} renews the {coating|seasoning}",
        ),
        ("leaving the pan to soak", "putting it away wet"),
        (10, 20),
    ),
    Topic(
        "repot a house plant",
        "repotting a house plant",
        (
            "choose a pot {one size larger|about three centimetres wider}",
            "{loosen|tease apart} the {old roots|root ball} with your fingers",
            "fill the {gaps|sides} with fresh {potting soil|compost}",
            "water it {well|slowly} and keep it out of {direct|strong} sun for {a week|a few days}",
        ),
        ("a larger pot", "fresh potting soil", "a small trowel", "some gravel"),
        (
            "{early spring|the start of spring} is the {best|easiest} time for it",
            "a pot with {holes|a drain hole} keeps the roots {healthy|from rotting}",
        ),
        ("choosing a pot that is far too big", "pressing the soil too hard"),
        (20, 40),
    ),
    Topic(
        "speed up an old laptop",
        "speeding up an old laptop",
        (
            "{check|look at} which programs start {by themselves|on their own}",
            "{remove|uninstall} the {programs|apps} that you {never|no longer} use",
            "free at least {ten|twenty} gigabytes of {disk|storage} space",
            "{restart|reboot} it and {install|apply} the {pending|latest} updates",
        ),
        ("a backup disk", "a soft brush for the fan", "a small screwdriver", "the latest updates"),
        (
            "{more memory|a solid state disk} helps {more than anything else|the most}",
            "{dust in the fan|a blocked fan} makes {any|every} laptop slow",
        ),
        ("running two virus scanners", "deleting files without a backup"),
        (30, 90),
    ),
    Topic(
        "bake a loaf of bread",
        "baking a loaf of bread",
        (
            "mix {flour, water, salt and yeast|the dry ingredients with warm water} into a {rough|soft} dough",
            "knead it for {eight|ten} minutes until it {is smooth|stretches easily}",
            "let it rise {under a damp cloth|in a warm place} until it {doubles|has doubled}",
            "bake it at {two hundred and twenty|two hundred and thirty} degrees until the crust is {brown|dark gold}",
        ),
        ("strong flour", "dry yeast", "a kitchen scale", "a heavy tin"),
        (
            "a {bowl|tray} of water in the oven gives a {crisp|better} crust",
            "{weigh|measure} everything, because {cups|spoons} are not {exact|reliable}",
        ),
        ("adding too much flour", "cutting the loaf while it is hot"),
        (120, 200),
    ),
    Topic(
        "fix a flat bicycle tyre",
        "fixing a flat bicycle tyre",
        (
            "take the wheel {off|out} and {lever|pull} the tyre from the rim",
            "{find|look for} the hole by {listening for air|dipping the tube in water}",
            "{sand|roughen} the spot, spread the glue and {press|hold} the patch on it",
            "put the tube back and pump it {slowly|in stages}",
        ),
        ("two tyre levers", "a patch kit", "a pump", "a spare tube"),
        (
            "{feel|check} the inside of the tyre for {glass|thorns} first",
            "{wait|leave} the glue for {two|three} minutes {before the patch goes on|so that it gets tacky}",
        ),
        ("pinching the tube with a lever", "forgetting what caused the hole"),
        (15, 35),
    ),
    Topic(
        "plan a weekly budget",
        "planning a weekly budget",
        (
            "{write down|list} what {comes in|you earn} each week",
            "{add up|total} the {fixed costs|bills} such as rent and {power|transport}",
            "set a {limit|ceiling} for food and {another|one} for fun",
            "{compare|check} the plan with your {receipts|spending} every {Sunday|Friday}",
        ),
        ("your last bank statement", "a notebook", "your receipts", "a calculator"),
        (
            "{keep|put} a {small|modest} sum aside for {surprises|repairs}",
            "{paying yourself first|saving on pay day} makes it {easier|much easier}",
        ),
        ("forgetting the yearly bills", "making the plan too strict"),
        (30, 60),
    ),
    Topic(
        "prepare for a job interview",
        "preparing for a job interview",
        (
            "read the {advert|job description} {twice|carefully} and {mark|underline} the main skills",
            "{prepare|write} one short {story|example} for each {skill|point}",
            "{practise|rehearse} the answers {aloud|with a friend}",
            "{think of|note} {two|three} {good|honest} questions for them",
        ),
        ("the job description", "a copy of your resume", "clean clothes", "the address"),
        (
            "{arrive|be there} ten minutes early and {breathe|take a breath}",
            "{pauses are|a short pause is} better than {filler words|rushing}",
        ),
        ("learning answers by heart", "speaking badly of the last boss"),
        (60, 120),
    ),
    Topic(
        "remove a wine stain",
        "removing a wine stain",
        (
            "{blot|dab} the stain with a {clean cloth|paper towel}, never rub",
            "{pour|drip} cold water {over it|through the fabric} from the back",
            "cover it with {salt|baking soda} and {wait|leave it} for ten minutes",
            "wash it {as usual|at a low temperature} and {check|look} before you dry it",
        ),
        ("a clean cloth", "cold water", "baking soda", "some white vinegar"),
        (
            "the {sooner|faster} you start, the {better|easier} it goes",
            "{test|try} any {cleaner|liquid} on a hidden {corner|seam} first",
        ),
        ("using hot water", "rubbing the stain deeper"),
        (15, 30),
    ),
    Topic(
        "learn a few words of Italian",
        "learning a few words of Italian",
        (
            "start with {greetings|ten polite phrases} and {numbers|the numbers to twenty}",
            "{say|repeat} each word {aloud|three times} while you {look at|picture} its meaning",
            "{review|go over} {yesterday's|the old} words every {morning|evening}",
            "{use|try} them in {a short chat|a song or a recipe} once a week",
        ),
        ("a small phrase book", "paper cards", "a pencil", "a patient friend"),
        (
            "{five|ten} words a day are {plenty|more than enough}",
            "{singing along|children's songs} {helps|help} with the {sounds|vowels}",
        ),
        ("starting with grammar tables", "skipping the review"),
        (15, 30),
    ),
    Topic(
        "paint a bedroom wall",
        "painting a bedroom wall",
        (
            "{move|push} the furniture {away|to the middle} and cover the floor",
            "{fill|close} the {holes|cracks} and {sand|smooth} them when dry",
            "tape the {edges|window frames} and paint the {corners|edges} with a brush",
            "roll the {paint|colour} on in {two thin coats|overlapping strips}",
        ),
        ("a roller", "masking tape", "an old sheet", "a good brush"),
        (
            "{open|keep} a window {open|ajar} so that the paint dries {evenly|faster}",
            "{peel|pull} the tape off while the paint is {damp|still wet}",
        ),
        ("painting over dust", "loading too much paint on the roller"),
        (180, 300),
    ),
    Topic(
        "make a pot of vegetable soup",
        "making a pot of vegetable soup",
        (
            "{chop|cut} an onion, two carrots and {some celery|a leek}",
            "{soften|fry} them gently in {butter|olive oil} for {five|eight} minutes",
            "add {stock|hot water} and {a handful of lentils|two diced potatoes}",
            "{simmer|cook} it for {twenty|thirty} minutes and {season|salt} it at the end",
        ),
        ("two onions", "three carrots", "a large pot", "a litre of stock"),
        (
            "a {squeeze|splash} of lemon {wakes up|brightens} the taste",
            "{it tastes|soup tastes} even better {the next day|tomorrow}",
        ),
        ("boiling it too hard", "adding all the salt at the start"),
        (40, 60),
    ),
    Topic(
        "set up a home network",
        "setting up a home network",
        (
            "{place|put} the router {high up|in the middle} of the {flat|house}",
            "{change|replace} the {default|factory} password {at once|first}",
            "{choose|set} the {newest|strongest} {encryption|security} that it offers",
            "{connect|add} your {devices|computers} one {by one|after another} and test them",
        ),
        ("a router", "a network cable", "the access code", "a long password"),
        (
            "{cables are|a cable is} {faster|steadier} than {radio|wireless} for a {desktop|television}",
            "a guest network keeps {visitors|strangers} {apart|away from your files}",
        ),
        ("hiding the router in a cupboard", "keeping the factory password"),
        (30, 60),
    ),
    Topic(
        "write a thank you letter",
        "writing a thank you letter",
        (
            "{open|begin} with {the gift|what you are thankful for}",
            "{say|explain} how you {use it|felt about it} in {one or two|a couple of} sentences",
            "{mention|add} a {memory|moment} that you {share|both remember}",
            "{close|end} with a {warm|kind} wish and {sign|write} your name by hand",
        ),
        ("good paper", "a pen", "an envelope", "a stamp"),
        (
            "{short and honest|simple words} {beats|beat} {long and formal|fancy phrases}",
            "{send|post} it within {a week|ten days}",
        ),
        ("copying a phrase from a card", "waiting for months"),
        (15, 30),
    ),
    Topic(
        "sharpen a kitchen knife",
        "sharpening a kitchen knife",
        (
            "{soak|wet} the stone for {ten|fifteen} minutes",
            "{hold|keep} the blade at an angle of {fifteen|twenty} degrees",
            "{draw|pull} it across the {coarse|rough} side {ten|twelve} times per {edge|side}",
            "{repeat|finish} on the fine side and {rinse|wipe} the blade",
        ),
        ("a whetstone", "a damp towel", "some water", "a sheet of paper for a test"),
        (
            "a {damp|wet} towel under the stone {stops|prevents} it from slipping",
            "a sharp knife {slices|cuts} {paper|a tomato} {cleanly|without pressure}",
        ),
        ("changing the angle midway", "pressing too hard"),
        (20, 30),
    ),
    Topic(
        "train a young dog to sit",
        "training a young dog to sit",
        (
            "{hold|show} a {treat|biscuit} just above its nose",
            "{move|lift} your hand {back|slowly back} until it {sits down|lowers its hips}",
            "say the word {once|clearly} and {give|hand over} the treat {at once|right away}",
            "{repeat|practise} it {five|ten} times and {stop|finish} while it is {keen|happy}",
        ),
        ("small treats", "a short lead", "a quiet room", "some patience"),
        (
            "{short|brief} lessons {twice|three times} a day work {best|well}",
            "{praise|reward} must come within {a second|two seconds}",
        ),
        ("pushing the dog down", "repeating the word too often"),
        (5, 15),
    ),
    Topic(
        "sleep better at night",
        "sleeping better at night",
        (
            "{go to bed|lie down} and {get up|rise} at the same {time|hour} every day",
            "{turn off|put away} {screens|your phone} an hour before {bed|sleep}",
            "keep the {bedroom|room} {dark|cool} and {quiet|well aired}",
            "{write|put} your {worries|plans for tomorrow} on paper {early in the evening|after dinner}",
        ),
        ("thick curtains", "an alarm clock", "a paper book", "a cool room"),
        (
            "{coffee|tea} after {lunch|two o'clock} may {keep you awake|cost you an hour of sleep}",
            "{a short walk|some daylight} in the morning sets your {clock|rhythm}",
        ),
        ("lying awake for hours", "napping late in the day"),
        (30, 60),
    ),
    Topic(
        "grow tomatoes on a balcony",
        "growing tomatoes on a balcony",
        (
            "{plant|set} the seedlings {deep|up to the first leaves} in a {big|ten litre} pot",
            "{tie|fasten} them {loosely|gently} to a {stick|cane}",
            "water the {soil|roots} every {morning|day}, not the leaves",
            "{pinch|snap} off the side shoots {once a week|every few days}",
        ),
        ("a deep pot", "a wooden cane", "tomato feed", "a sunny corner"),
        (
            "{six hours|half a day} of sun {is|are} {enough|what they need}",
            "{feed|fertilise} them {every two weeks|twice a month} once they {flower|bloom}",
        ),
        ("planting before the last frost", "wetting the leaves"),
        (30, 45),
    ),
    Topic(
        "back up your photos",
        "backing up your photos",
        (
            "{gather|collect} all the pictures in one {folder|place}",
            "{sort|group} them by year and {delete|drop} the {blurred|double} ones",
            "copy the folder to {an external disk|a second disk}",
            "{keep|store} another copy {at a friend's house|online} and {test|open} it once",
        ),
        ("an external disk", "a cable", "a free evening", "a label"),
        (
            "{three copies|two disks and one copy elsewhere} are {safe|the usual rule}",
            "{set|put} a {reminder|note} in the calendar {each|every} month",
        ),
        ("trusting a single disk", "never testing the copy"),
        (45, 120),
    ),
    Topic(
        "cook fluffy rice",
        "cooking fluffy rice",
        (
            "{rinse|wash} the rice until the water {runs|is} clear",
            "use {one and a half|two} cups of water for {each|every} cup of rice",
            "bring it to a boil, {cover it|put the lid on} and turn the heat {low|down}",
            "{wait|leave it} for {twelve|fifteen} minutes and {fluff|loosen} it with a fork",
        ),
        ("long grain rice", "a pot with a lid", "a fork", "a pinch of salt"),
        (
            "{resting|five minutes of rest} {under the lid|off the heat} makes it {lighter|drier}",
            "{toasting|frying} the grains first gives a {nutty|deeper} taste",
        ),
        ("stirring while it cooks", "lifting the lid too early"),
        (20, 30),
    ),
    Topic(
        "pack a suitcase for a short trip",
        "packing a suitcase for a short trip",
        (
            "{check|look up} the weather and {lay out|choose} {three|four} outfits",
            "{roll|fold} the {soft clothes|shirts} {tightly|neatly}",
            "put {shoes|heavy things} {at the bottom|near the wheels} and {fill|stuff} them with socks",
            "keep {papers|tickets} and {medicine|chargers} in the {outer|top} pocket",
        ),
        ("a small case", "a wash bag", "a charger", "a light jacket"),
        (
            "{leave|keep} a little {room|space} for {gifts|the way back}",
            "{wear|put on} the {heaviest|bulkiest} shoes on the {journey|train}",
        ),
        ("packing for every possible weather", "putting liquids on top"),
        (20, 40),
    ),
    Topic(
        "give a short speech",
        "giving a short speech",
        (
            "{choose|pick} one {message|idea} and {put|write} it in a single sentence",
            "{open|start} with a {story|question} that {leads|points} to it",
            "{support|back} it with {two|three} {examples|facts}",
            "{end|finish} by {repeating|returning to} the {message|first line} and {pause|smile}",
        ),
        ("a few cue cards", "a glass of water", "a clock", "a friend who listens"),
        (
            "{speak|talk} {slower|more slowly} than {feels natural|you think you should}",
            "{look at|find} one {friendly|kind} face in {each corner|the room}",
        ),
        ("reading from the page", "saying sorry at the start"),
        (45, 90),
    ),
    Topic(
        "unblock a kitchen sink",
        "unblocking a kitchen sink",
        (
            "{scoop|take} out the {standing water|water} with a cup",
            "{pour|tip} {baking soda|half a cup of soda} and then vinegar into the drain",
            "{wait|give it} {ten|fifteen} minutes and {rinse|flush} with hot water",
            "if it is still slow, {open|unscrew} the {trap|bend} over a bucket and clean it",
        ),
        ("a plunger", "baking soda", "vinegar", "a bucket"),
        (
            "a {sieve|strainer} in the drain {prevents|stops} the next {block|clog}",
            "{never pour|keep} {fat|oil} {down|away from} the {drain|sink}",
        ),
        ("mixing chemical cleaners", "forgetting the bucket"),
        (20, 45),
    ),
    Topic(
        "start running",
        "starting to run",
        (
            "{walk|go} briskly for {five|ten} minutes to warm up",
            "{run|jog} for one minute and walk for {one|two}, {eight|six} times",
            "{keep|hold} a pace at which you {can talk|could chat}",
            "{rest|take a break} for a day and add {a minute|a little} each week",
        ),
        ("proper shoes", "light clothes", "a watch", "a quiet path"),
        (
            "{three|two} runs a week are {enough|plenty} {for a start|at first}",
            "{soft ground|a forest path} is {kinder|easier} on the knees",
        ),
        ("running too fast", "training through pain"),
        (25, 40),
    ),
    Topic(
        "organise a birthday party",
        "organising a birthday party",
        (
            "{fix|choose} a {date|day} and {count|list} the guests",
            "{send|write} the invitations {two weeks|ten days} ahead",
            "{plan|prepare} {two|three} simple games and {a cake|some finger food}",
            "{decorate|set up} the room {the evening before|in the morning} and {ask|find} a helper",
        ),
        ("a guest list", "balloons", "a cake", "some music"),
        (
            "{a clear end|an end time} on the {invitation|card} {helps everybody|is kind to parents}",
            "{ask|check} about allergies {before you cook|early}",
        ),
        ("inviting too many people", "planning every minute"),
        (90, 180),
    ),
    Topic(
        "descale a kettle",
        "descaling a kettle",
        (
            "{fill|half fill} it with {equal parts of water and vinegar|water and a spoon of citric acid}",
            "{boil|heat} it and let it {stand|sit} for {half an hour|twenty minutes}",
            "{empty|pour} it out and {wipe|brush} away the {loose|soft} scale",
            "{boil|rinse with} fresh water {twice|two times} and {throw|pour} it away",
        ),
        ("white vinegar", "citric acid", "a soft brush", "fresh water"),
        (
            "{filtered|soft} water {keeps|leaves} it clean for {longer|months}",
            "{do|repeat} it {every two months|when you see white flakes}",
        ),
        ("scratching the metal", "making tea with the first water"),
        (30, 45),
    ),
    Topic(
        "read more books",
        "reading more books",
        (
            "{keep|leave} a book {by the bed|in your bag} at all times",
            "{read|finish} {ten|fifteen} pages at the same {hour|time} each day",
            "{drop|put down} a book that {bores|does not hold} you after fifty pages",
            "{note|write} one {sentence|thought} about {each|every} book you {finish|like}",
        ),
        ("a library card", "a reading lamp", "a list of titles", "a bookmark"),
        (
            "{a friend|a reading group} who {asks|wants to know} about it keeps you {going|curious}",
            "{short stories|thin books} are a {fine|gentle} way {in|to begin}",
        ),
        ("starting five books at once", "reading what others find important"),
        (15, 30),
    ),
    Topic(
        "mend a torn shirt",
        "mending a torn shirt",
        (
            "{match|choose} a thread {that fits the colour|one shade darker}",
            "{pin|hold} the {edges|torn sides} together {from the inside|on the wrong side}",
            "sew {small|tight} {stitches|loops} {along|across} the tear",
            "{knot|fasten} the thread {twice|well} and {press|iron} the seam flat",
        ),
        ("a fine needle", "matching thread", "some pins", "an iron"),
        (
            "a {patch|piece of fabric} {behind|under} the tear makes it {stronger|last}",
            "{good light|a bright lamp} {saves|spares} your eyes",
        ),
        ("pulling the thread too tight", "starting without a knot"),
        (15, 35),
    ),
    Topic(
        "brew good coffee",
        "brewing good coffee",
        (
            "{grind|weigh} {fifteen|eighteen} grams of {fresh beans|coffee} per cup",
            "{heat|bring} the water to {ninety two|ninety four} degrees",
            "{wet|pour a little water on} the grounds and {wait|let them swell} for thirty seconds",
            "{pour|add} the rest in {slow|small} circles for {two|three} minutes",
        ),
        ("fresh beans", "a grinder", "paper filters", "a kettle"),
        (
            "{buy|order} beans in small bags and {keep|store} them {closed|in a tin}",
            "if it tastes {bitter|harsh}, grind a little {coarser|rougher}",
        ),
        ("using boiling water", "grinding days ahead"),
        (5, 10),
    ),
    Topic(
        "hang a picture straight",
        "hanging a picture straight",
        (
            "{hold|place} the picture {at eye height|on the wall} and {mark|pencil} its top edge",
            "measure from the {edge|top} to the {stretched|tight} wire",
            "{transfer|move} that distance {down|below the mark} and {drive|put} the hook in",
            "hang it and {check|correct} it with a {level|spirit level}",
        ),
        ("a spirit level", "a pencil", "a hook", "a hammer"),
        (
            "{two hooks|a second hook} {keep|keeps} a {wide|heavy} frame from {tilting|turning}",
            "{tap|knock on} the wall {first|before you drill} to find {pipes|the studs}",
        ),
        ("guessing the height", "using a nail that is too thin"),
        (10, 25),
    ),
    Topic(
        "study for a history exam",
        "studying for a history exam",
        (
            "{draw|make} a {time line|table} of the {main|key} events",
            "{explain|retell} each {event|period} {aloud|in your own words}",
            "{answer|work through} {two|three} old {papers|exam questions} against the clock",
            "{review|repeat} the {weak|difficult} points {the day before|after a good night's sleep}",
        ),
        ("your class notes", "coloured pens", "old exam papers", "a quiet desk"),
        (
            "{causes|reasons} {matter|count} more than {dates|single dates}",
            "{study|work} in blocks of {twenty five|thirty} minutes with {short|real} breaks",
        ),
        ("reading the same page again and again", "learning through the night"),
        (90, 150),
    ),
    Topic(
        "clean a bathroom mirror",
        "cleaning a bathroom mirror",
        (
            "{dust|wipe} the {glass|mirror} with a dry cloth",
            "{mix|stir} {one part vinegar with four parts water|a little vinegar into water}",
            "{spray|put} it {on a cloth|on the cloth, not on the glass} and wipe {from top to bottom|in lines}",
            "{polish|dry} it with {newspaper|a soft cloth}",
        ),
        ("a soft cloth", "white vinegar", "a spray bottle", "old newspaper"),
        (
            "{shaving foam|a thin film of soap} {keeps|stops} it from fogging",
            "{clean|do} it {in the morning|when it is cool} to avoid {streaks|smears}",
        ),
        ("spraying the edges", "using a dirty cloth"),
        (5, 15),
    ),
    Topic(
        "choose a good melon",
        "choosing a good melon",
        (
            "{lift|weigh} it in your hand, since a {ripe|good} one is {heavy|surprisingly heavy}",
            "{smell|sniff} the {stem end|base} for a {sweet|flowery} scent",
            "{press|push} the {end|tip} {gently|with a thumb}; it should {give|yield} a little",
            "{tap|knock on} it and {listen|wait} for a {deep|dull} sound",
        ),
        ("your nose", "a steady hand", "a shopping bag", "a little time"),
        (
            "{late summer|August} is {the best season|when they are sweetest}",
            "a {pale|yellow} spot {shows|means} that it {ripened|lay} in the {field|sun}",
        ),
        ("buying a soft one", "going by the colour alone"),
        (5, 10),
    ),
)
