//! The patterns that guests fill their memory with: eight bytes, none of them zero, different for each guest.

/// What guest number `number` writes, as its own code does.
pub(crate) fn of_guest(number: u32) -> u64 {
    pattern(b'G', number)
}

/// What the VMM writes into guest number `number`, as a device would.
pub(crate) fn of_device(number: u32) -> u64 {
    pattern(b'D', number)
}

/// What a stray device writes.
pub(crate) const OF_STRAY_DEVICE: u64 = u64::from_le_bytes(*b"STRAYDEV");

/// Reads as text in a memory dump: a letter, `-`, and six digits.
fn pattern(letter: u8, number: u32) -> u64 {
    let mut bytes = [letter, b'-', b'0', b'0', b'0', b'0', b'0', b'0'];
    let mut rest = number;
    for digit in bytes[2..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    u64::from_le_bytes(bytes)
}

/// Whose a word is, if it is one of these patterns.
pub(crate) fn owner(word: u64) -> Option<String> {
    let bytes = word.to_le_bytes();
    if word == OF_STRAY_DEVICE {
        return Some("the stray device".into());
    }
    let number: u32 = std::str::from_utf8(&bytes[2..]).ok()?.parse().ok()?;
    match (bytes[0], bytes[1]) {
        (b'G', b'-') => Some(format!("guest-{number}")),
        (b'D', b'-') => Some(format!("a device of guest-{number}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_have_no_zero_byte_and_name_their_owner() {
        for number in [1, 9, 10, 10_000] {
            let (guest, device) = (of_guest(number), of_device(number));
            assert!(
                guest
                    .to_le_bytes()
                    .iter()
                    .chain(&device.to_le_bytes())
                    .all(|byte| *byte != 0)
            );
            assert_eq!(owner(guest), Some(format!("guest-{number}")));
            assert_eq!(owner(device), Some(format!("a device of guest-{number}")));
        }
        assert_ne!(of_guest(1), of_guest(2));
        assert_eq!(owner(0), None);
        assert_eq!(owner(OF_STRAY_DEVICE).as_deref(), Some("the stray device"));
    }
}
