"""The public names of audio_lens: the one list of them."""

from . import analysis as analysis
from . import corruptions as corruptions
from . import edits as edits
from . import metrics as metrics
from . import models as models
from . import patching as patching
from . import places as places
from . import profile as profile
from . import recipes as recipes
from . import report as report
from .alignment import Alignment as Alignment
from .alignment import AlignmentError as AlignmentError
from .alignment import align as align
from .alignment import read_textgrid as read_textgrid
from .audio import AudioError as AudioError
from .cache import AudioCache as AudioCache
from .edits import Edit as Edit
from .edits import intervene as intervene
from .errors import AudioLensError as AudioLensError
from .errors import InputError as InputError
from .files import OutputError as OutputError
from .hooks import DeadHookError as DeadHookError
from .hooks import HookNameError as HookNameError
from .hooks import HookPoint as HookPoint
from .inputs import AudioInputs as AudioInputs
from .models import HookedAudioTransformer as HookedAudioTransformer
from .models import LoadingError as LoadingError
from .models import TokenError as TokenError
from .pairs import Pair as Pair
from .pairs import minimal_pair as minimal_pair
from .pickles import NoModelError as NoModelError
from .places import Words as Words
from .places import locate as locate
from .synthesis import Spoken as Spoken
from .synthesis import SynthesisError as SynthesisError
from .synthesis import can_speak as can_speak
from .synthesis import speak as speak
from .timeline import Band as Band
from .timeline import Span as Span
from .timeline import Timeline as Timeline

__version__: str
