"""What a run will take: rows, bytes, hours, money, memory and requests, before it is begun."""
