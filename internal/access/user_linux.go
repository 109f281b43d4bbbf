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

	"golang.org/x/sys/unix"
)

// otherUser says why the local peer of a connection is not one to trust: its socket belongs to another user than this
// process's own or root. So a proxy that runs as www-data or haproxy is told from curl, whatever it forwards. It returns
// nothing if the socket is ours or root's.
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
	if uid, err := askSocket(peer, here); err == nil {
		return uid, nil
	}
	return findSocket(peer, here) // not every kernel, or sandbox, answers
}

// askSocket asks the kernel for that socket alone, by its netlink protocol for the diagnosis of sockets (sock_diag(7)): that
// takes as long among many sockets as among few.
func askSocket(peer, here netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	const (
		header  = unix.SizeofNlMsghdr
		request = header + 8 + socketID      // struct inet_diag_req_v2
		answer  = header + 4 + socketID + 20 // struct inet_diag_msg
	)
	q := make([]byte, 0, request)
	q = binary.NativeEndian.AppendUint32(q, request)
	q = binary.NativeEndian.AppendUint16(q, unix.SOCK_DIAG_BY_FAMILY)
	q = binary.NativeEndian.AppendUint16(q, unix.NLM_F_REQUEST)
	q = append(q, make([]byte, 8)...) // sequence, port: there is one question
	family := byte(unix.AF_INET)
	if peer.Addr().Is6() {
		family = unix.AF_INET6
	}
	q = append(q, family, unix.IPPROTO_TCP, 0, 0)
	q = binary.NativeEndian.AppendUint32(q, ^uint32(0)) // in any state
	q = appendSocketID(q, peer, here)
	if err := unix.Sendto(fd, q, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, err
	}
	var a [1 << 10]byte
	n, _, err := unix.Recvfrom(fd, a[:], unix.MSG_DONTWAIT) // the kernel answers within the call before
	switch {
	case err != nil:
		return 0, err
	case n < answer || binary.NativeEndian.Uint16(a[4:]) != unix.SOCK_DIAG_BY_FAMILY:
		return 0, errNoSocket
	}
	// It may be another one: where there is no such connection, the kernel takes one that listens at peer.
	id := a[header+4:][:socketID]
	if from, to := socketEnds(id, a[header]); from != peer || to != here {
		return 0, errNoSocket
	}
	rest := id[socketID:cap(id)][12:] // behind idiag_expires, idiag_rqueue and idiag_wqueue
	uid, inode := binary.NativeEndian.Uint32(rest), binary.NativeEndian.Uint32(rest[4:])
	if inode == 0 { // as in scanSockets
		return 0, errNoSocket
	}
	return int(uid), nil
}

// socketID is the size of struct inet_diag_sockid: the ports, the addresses, an interface, a cookie.
const socketID = 2 + 2 + 16 + 16 + 4 + 8

func appendSocketID(b []byte, from, to netip.AddrPort) []byte {
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	for _, end := range []netip.AddrPort{from, to} {
		ip := end.Addr().AsSlice()
		b = append(append(b, ip...), make([]byte, 16-len(ip))...)
	}
	b = append(b, 0, 0, 0, 0)                                        // any interface
	return append(b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff) // INET_DIAG_NOCOOKIE
}

func socketEnds(id []byte, family byte) (from, to netip.AddrPort) {
	length := 4
	if family == unix.AF_INET6 {
		length = 16
	}
	end := func(port, ip []byte) netip.AddrPort {
		addr, _ := netip.AddrFromSlice(ip[:length])
		return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(port))
	}
	return end(id, id[4:]), end(id[2:], id[20:])
}

// findSocket looks that socket up in the tables of all TCP sockets.
func findSocket(peer, here netip.AddrPort) (int, error) {
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
