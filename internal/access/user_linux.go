package access

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// otherUser says why the local peer of a connection is not one to trust: its socket belongs to another user than this
// process's own or root. So a proxy that runs as www-data or haproxy is told from curl, whatever it forwards. It returns
// nothing if the socket is ours or root's. It reads the table of all TCP sockets, and so is for API calls only.
func otherUser(peer, here netip.AddrPort) string {
	uid, err := socketUser(peer, here)
	switch {
	case err != nil:
		return fmt.Sprintf("whose process the local peer %s is cannot be told (%v)", peer, err)
	case uid != 0 && uid != os.Geteuid():
		return fmt.Sprintf("the local peer %s belongs to user id %d, which is neither the gateway's own nor root", peer, uid)
	}
	return ""
}

var errNoSocket = errors.New("it has no open socket here")

// socketUser returns the user who made the socket at peer's end of a connection between two local sockets.
func socketUser(peer, here netip.AddrPort) (int, error) {
	var err error
	for range 3 { // the kernel does not hold the table still while it is read, so a line may be missed
		// An IPv4 connection is in the second table if the peer made it from an IPv6 socket.
		for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
			var uid int
			if uid, err = scanSockets(table, peer, here); err == nil {
				return uid, nil
			}
			if !errors.Is(err, errNoSocket) && !errors.Is(err, fs.ErrNotExist) { // no tcp6: IPv6 is off
				return 0, err
			}
		}
	}
	return 0, errNoSocket
}

// scanSockets looks up the user of the socket whose own address is peer and whose other end is here, in a file laid out
// as proc_net_tcp.rst of the kernel says: sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid
// timeout inode.
func scanSockets(table string, peer, here netip.AddrPort) (int, error) {
	f, err := os.Open(table)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(make([]byte, 64<<10), 64<<10)
	lines.Scan() // the headings
	port := fmt.Appendf(nil, ":%04X ", peer.Port())
	for lines.Scan() {
		if !bytes.Contains(lines.Bytes(), port) {
			continue // nearly all of them, without taking them apart
		}
		column := strings.Fields(lines.Text())
		if len(column) < 10 || parseSocket(column[1]) != peer || parseSocket(column[2]) != here {
			continue
		}
		if column[9] == "0" {
			// No inode: its process has closed it, and the kernel then says user 0, whoever it was.
			return 0, errNoSocket
		}
		return strconv.Atoi(column[7])
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	return 0, errNoSocket
}

// parseSocket reads an address as the table has it: one or four words in hexadecimal, each a native integer that holds
// four bytes in network order; a colon; the port. It returns the zero AddrPort for anything else.
func parseSocket(s string) netip.AddrPort {
	words, portText, _ := strings.Cut(s, ":")
	port, err := strconv.ParseUint(portText, 16, 16)
	if err != nil || len(words) != 8 && len(words) != 32 {
		return netip.AddrPort{}
	}
	var b []byte
	for ; words != ""; words = words[8:] {
		w, err := strconv.ParseUint(words[:8], 16, 32)
		if err != nil {
			return netip.AddrPort{}
		}
		b = binary.NativeEndian.AppendUint32(b, uint32(w))
	}
	ip, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(ip.Unmap(), uint16(port))
}
