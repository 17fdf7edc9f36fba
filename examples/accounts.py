"""Accounts: many transfers at once, by clients that disturb each other. No money is made and none is lost."""

import asyncio
import random
import sys

from client import Client
from client.store import Transaction

ACCOUNTS = [f"account/{name}" for name in ("ann", "bob", "cem", "dan")]
START = 100


async def transfer(client: Client, source: str, target: str, amount: int) -> bool:
    """Move an amount if there is enough; say whether it was moved."""

    async def work(transaction: Transaction) -> bool:
        left = int(await transaction.get(source) or b"0") - amount
        if left < 0:
            return False
        transaction.put(source, str(left))
        transaction.incr(target, amount)
        return True

    return await client.transact(work)


async def main(directory: str) -> None:
    async with Client.from_dir(directory) as one, Client.from_dir(directory) as two:
        await one.put_many({account: str(START) for account in ACCOUNTS})
        choice = random.Random(1)
        transfers = [
            transfer(choice.choice([one, two]), *choice.sample(ACCOUNTS, 2), choice.randint(1, 60)) for _ in range(40)
        ]
        done = await asyncio.gather(*transfers)
        balances = [int(value or b"0") for value in await one.get_many(ACCOUNTS)]
        print(f"{sum(done)} of {len(done)} transfers done, nobody below zero: {min(balances) >= 0}")
        print(f"in all accounts together: {sum(balances)}")


asyncio.run(main(sys.argv[1]))
