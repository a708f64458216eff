"""Everything that carries memory from token to token: the WKV op in all its forms and the token shift, alone or
shared over ranks."""
