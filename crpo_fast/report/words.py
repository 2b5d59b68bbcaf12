"""Words that a report may show of a completion without --show-text; all others are hidden.

A list of what is allowed, and not of what is not: a name, a place or a number that a model took
from a post (of this prompt or any other) can then never appear. The words are function words and
the vocabulary of appraisal; none of them says who wrote.
"""

FUNCTION_WORDS = """
a about above after again against all almost alone along also although always am among an and
another any anyone anything are as at away back be because been before began behind being below
between both but by can cannot come comes could did do does doing done down during each either else
enough even ever every few first five for four from further gave get gets give given gives go goes
going gone had has have having he hence her here hers him his how however i if in indeed into is it
its itself just keep keeps kind know last least less let like likely little lot made make makes many
may me might mine more most much must my name named neither never no nobody none nor not nothing now
of off often on once one only onto or other others our out over own perhaps rather said same say
says see seem seems she should since so some someone something soon still such take takes tell
tells than that the their them then there therefore these they thing things this those though three
through thus to together too toward towards two under unless until up upon us very was way we well
were what when where whether which while who whole whom whose why will with within without would
yet you your yours
"""

APPRAISAL_WORDS = """
able absent accept acceptance accepted act acting action afraid agitated alarm anger angry anxiety
anxious appraisal appraise ashamed asks assess assessment avoid avoidance bad balance
behavior behaviour beyond blame burden calm calmly capable care cause causes challenge change clear
cognitive comfort concern confident confused consequence consider control cope copes coping could
crisis danger daunted demand demands depressed depression despair difficult direct distress doubt
effort emotion emotional emotions evaluation event events exhausted expect experience express
expresses face faces fear feel feeling feelings feels focus future gain goal goals good grief guilt
guilty harm harmful help helped helpless helps high hope hopeless hurt ideation impact implication
important indicate indicates indicator insight intense internal judge judgement know lack lacks lean
level loneliness lonely loss low main major manage manageable matter matters meaning means mental
mild mind minimum minor mixed moderate mood named need needs negative neutral nervous normal
normative options outcome outlook overwhelmed pain panic passing passive past peace perceive
perceives person physical plan plans point positive possible post poster potential present pressure
primary problem problems question reaction reactions reappraisal reason reasons regret relevance
relevant relief resource resources respond response rest result risk sad sadness safe secondary
seek self sense serious severe severity shame sign significance significant signs situation sleep
small social solve some source stable stake state states steady step stimulus strain stress
stressful stressor strong suffer suffering support supported supportive surprise takes tense
tension think thought threat threatened threatening tired trigger trouble uncertain uncertainty
unable uneasy unrest upset urgent value want wants weak well wish wishes word words worried worry
worse writer yes
"""

SAFE_WORDS = frozenset((FUNCTION_WORDS + APPRAISAL_WORDS).split())
