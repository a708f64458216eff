"""What carries memory from token to token: the WKV op in all its forms, the token shift, both shared over ranks."""
