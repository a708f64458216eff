"""What carries memory from token to token in a segment: the state through the WKV op, the token shift, alone or shared
over ranks."""
