from tests.openvclip.conftest import small_world as small_world
